"""Several engines or API servers: all have a steer that was loaded through one of them, or none."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from loading_servers import (
    AUTHORIZED,
    KEY,
    SMALL,
    ask,
    load,
    named_in,
    text_and_header,
    write_runtime_config,
    write_steers,
)
from server_process import serving_process

from vllm_steer.environment import API_KEY

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(900)]

ASKED = 50
PROGRAM = (str(Path(__file__).with_name("one_failing_worker.py")),)


@pytest.fixture(autouse=True)
def environment_of_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    monkeypatch.setenv("VLLM_STEER_TEST_FAIL", str(tmp_path / "fail"))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def answers(url: str, steer: str) -> Iterator[tuple[str, str]]:
    """The answers of new connections."""
    for _ in range(ASKED):
        yield text_and_header(ask(url, steer))


@pytest.mark.parametrize(
    "option", ["--data-parallel-size=2", "--api-server-count=2"], ids=["engines", "api-servers"]
)
def test_a_load_is_everywhere_or_nowhere(option: str, tmp_path: Path) -> None:
    config, steers = write_runtime_config(tmp_path), write_steers(tmp_path)
    options = (*SMALL, f"--steer-config={config}", option)
    with serving_process(tmp_path / "serve.log", options, PROGRAM) as (_, url):
        plain, _ = text_and_header(ask(url))
        expected = []
        for path in (steers["v0"], steers["v1"]):
            digest = load(url, "v", path, load_inplace=True).json()["digest"][:12]
            seen = set(answers(url, "v:2"))
            assert len(seen) == 1, seen
            text, header = seen.pop()
            assert header == f"v:2@{digest}"
            expected.append((text, header))
        assert len({plain, *(text for text, _ in expected)}) == 3
        (tmp_path / "fail").touch()
        for name in ("v", "other"):
            for _ in range(5):  # more often than there are places
                failed = load(url, name, steers["v2"], load_inplace=True)
                assert failed.status_code == 422, failed.text
                assert "this worker may not read it" in failed.json()["error"]["message"]
        assert set(answers(url, "v:2")) == {expected[1]}
        assert {ask(url, "other:1").status_code for _ in range(ASKED)} == {400}
        assert named_in(tmp_path / "state").keys() == {"v"}
        (tmp_path / "fail").unlink()
        assert load(url, "other", steers["v2"]).status_code == 200
        assert len(set(answers(url, "other:2"))) == 1
        unload = {"steer_name": "v"}
        reply = httpx.post(f"{url}/v1/unload_steer", json=unload, headers=AUTHORIZED, timeout=60)
        assert reply.status_code == 200
        assert {ask(url, "v:2").status_code for _ in range(ASKED)} == {400}
