"""Two nodes on loopback, one of which was started without the steer config."""

import subprocess
from pathlib import Path

import pytest
from server_process import (
    end,
    environment,
    free_port,
    random_steers,
    serve_command,
    tail,
    write_config,
)

LIMIT_S = 300


def test_a_node_without_the_steer_config_stops_the_start(tmp_path: Path) -> None:
    config = write_config(tmp_path, random_steers())
    shared = [
        "--data-parallel-size=2",
        "--data-parallel-size-local=1",
        "--data-parallel-address=127.0.0.1",
        f"--data-parallel-rpc-port={free_port()}",
    ]
    commands = {
        "first": [*shared, f"--port={free_port()}", f"--steer-config={config}"],
        "second": [*shared, "--headless", "--data-parallel-start-rank=1"],
    }
    nodes = {}
    try:
        for name, options in commands.items():
            with (tmp_path / name).open("wb") as log:
                nodes[name] = subprocess.Popen(
                    serve_command(*options),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
        try:
            code = nodes["first"].wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the first node still runs:\n{tail(tmp_path / 'first')}")
    finally:
        for node in nodes.values():
            end(node)
    assert code != 0
    log_text = (tmp_path / "first").read_text(errors="replace")
    message = "a data-parallel engine is not steered as this frontend is"
    assert f"{message}: start every node with the same --steer-config" in log_text
