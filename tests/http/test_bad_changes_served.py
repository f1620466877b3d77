"""Bad requests to load steers and damaged files, sent to a real server."""

import base64
import json
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
from loading_servers import (
    AUTHORIZED,
    KEY,
    SMALL,
    ask,
    load,
    text_and_header,
    write_runtime_config,
    write_steers,
)
from server_process import serving_process

sys.path.append(str(Path(__file__).parents[1] / "hostile"))
from bad_changes import LOAD, LOADED, Good, bad_requests, damaged_files

from benchmarks.soak.checks import processes
from vllm_steer.environment import API_KEY

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(900)]

REQUESTS, FILES = 1000, 300


def test_a_server_refuses_them_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    config, steers = write_runtime_config(tmp_path), write_steers(tmp_path)
    outside = tmp_path.parent / "outside"
    outside.write_bytes(steers["l0"].read_bytes())
    (tmp_path / "link").symlink_to(outside)
    (made := tmp_path / "made").mkdir()
    good = Good(steers["l0"], base64.b64encode(steers["l0"].read_bytes()).decode())
    log, statuses, wrong = tmp_path / "serve.log", Counter[int](), []
    options = (*SMALL, f"--steer-config={config}")
    with serving_process(log, options) as (process, url), httpx.Client(timeout=60) as client:
        assert load(url, LOADED, steers["v0"]).status_code == 200
        before, running = text_and_header(ask(url, f"{LOADED}:2")), processes(process.pid)
        for bad in bad_requests(REQUESTS, good, seed=1):
            headers = {"content-type": "application/json", **(AUTHORIZED if bad.key else {})}
            reply = client.post(url + bad.path, content=bad.body, headers=headers)
            statuses[reply.status_code] += 1
            if not 400 <= reply.status_code < 500 or reply.headers["x-steer"] != "none":
                wrong.append((bad.name, reply.status_code, bad.body[:200]))
        for name, data, facts in damaged_files(FILES, made, seed=1):
            file = {"steer_data": base64.b64encode(data).decode(), **facts}
            body = json.dumps({"steer_name": "x", **file})
            reply = client.post(url + LOAD, content=body, headers=AUTHORIZED)
            statuses[reply.status_code] += 1
            if not 400 <= reply.status_code < 500:
                wrong.append((name, reply.status_code, b""))
        assert wrong == []
        assert processes(process.pid) == running
        assert text_and_header(ask(url, f"{LOADED}:2")) == before
    print(dict(statuses))
    assert "Traceback" not in log.read_text(errors="replace")
    assert not list(tmp_path.rglob("CANARY")) and not Path("CANARY").exists()
