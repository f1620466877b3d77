"""``vllm-steer demo --page``: the server is up until the command is interrupted."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
from server_process import environment, free_port

pytestmark = pytest.mark.matrix
START_LIMIT_S = 200.0
PROGRAM = "from vllm_steer.cli import main; main()"


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_the_page_is_served_until_the_command_is_interrupted(
    signal_number: signal.Signals, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "demo.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "demo", "--page", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
            # A job in the background of a shell ignores Ctrl-C, and so would what it starts.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    address = f"http://127.0.0.1:{port}/steer"
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while f"open {address} " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        page = httpx.get(address)
        assert page.status_code == 200 and "<title>Steer</title>" in page.text
        assert httpx.get(f"http://127.0.0.1:{port}/v1/steers").json()["runtime"] is True
        assert "key to load steer files on the page: " in log.read_text()
        process.send_signal(signal_number)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert log.read_text().splitlines()[-1] == "stopped the server"
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)
