"""The run on a card, phase by phase: limits, what is left out, what the summary says."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.card import phases, run


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    (tmp_path / "pack" / "benchmarks").mkdir(parents=True)
    (tmp_path / "pack" / "made.json").write_text('{"git": {"commit": "abc"}}')
    return tmp_path / "pack"


def serve(
    pack: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: list[list[Any]],
    *options: str,
) -> tuple[int, dict[str, Any]]:
    """Run these phases; the exit code, and the phases of the summary by name."""
    out = pack.parent / "out"
    monkeypatch.setattr(run, "phases", lambda dry: groups)
    monkeypatch.setattr(run, "GRACE_S", 1)
    monkeypatch.setattr(sys, "argv", ["run.py", str(pack), str(out), *options])
    code = run.main()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pack"] == {"git": {"commit": "abc"}}
    return code, {each["phase"]: each for each in summary["phases"]}


def phase(name: str, code: str, limit_s: float = 20, **fields: Any) -> Any:
    return phases.Phase(name, ("-c", code, "{json}"), limit_s, **fields)


def test_a_failure_stops_no_other_phase(
    pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    good = 'import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(\'{"summary": "right"}\')'
    table = good.replace('"summary": "right"', '"rows": [1, 2], "left_out": [3]')
    bad = "print('first'); raise SystemExit('the last line')"
    groups = [[phase("bad", bad)], [phase("good", good), phase("table", table)]]
    code, found = serve(pack, monkeypatch, groups)
    assert code == 1
    assert (found["bad"]["state"], found["bad"]["said"]) == ("exit 1", "the last line")
    assert (found["good"]["state"], found["good"]["said"]) == ("ok", "right")
    assert found["table"]["said"] == "2 lines, 1 left out"
    said = capsys.readouterr().out
    assert said.index("SUMMARY") < said.rindex("bad") < said.rindex("good")


def test_a_phase_that_hangs_is_ended_with_what_it_has_started(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that does not listen to the first request."""
    child = "import time; time.sleep(60)"
    hangs = (
        "import pathlib, signal, subprocess, sys, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        'pathlib.Path(sys.argv[1]).write_text(\'{"summary": "child %d"}\' % p.pid); time.sleep(60)'
    )
    begun = time.monotonic()
    groups = [[phase("hangs", hangs, limit_s=8, least_s=0)], [phase("next", "")]]
    code, found = serve(pack, monkeypatch, groups)
    assert code == 1 and time.monotonic() - begun < 40
    assert found["hangs"]["state"] == "stopped at its limit of 8 s"
    assert found["next"]["state"] == "ok"
    pid = int(found["hangs"]["said"].split()[-1])
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_without_time_a_phase_is_left_out_and_said_to_be(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [
        [phase("long", "", limit_s=100, least_s=50)],
        [phase("short", "", least_s=1)],
    ]
    code, found = serve(pack, monkeypatch, groups, "--seconds", "30")
    assert code == 1
    assert [found[name]["state"] for name in ("long", "short")] == ["left out", "ok"]


def test_phases_by_name_and_caches_of_their_own(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows = (
        "import json, os, pathlib, sys; e = os.environ;"
        "said = e['VLLM_CACHE_ROOT'] + ' ' + e['PYTHONPATH'];"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps({'summary': said}))"
    )
    groups = [[phase("a", shows), phase("b", "raise SystemExit(1)")]]
    code, found = serve(pack, monkeypatch, groups, "--only", "a")
    assert code == 0 and found.keys() == {"a"}
    cache, path = found["a"]["said"].split()
    assert cache.endswith("caches/a") and str(pack.parent) not in cache
    assert path.split(os.pathsep)[0] == str(pack / "site")


def test_the_limits_of_a_run_on_a_card_fit_the_time_that_it_has() -> None:
    """Were every phase to need its limit, all but the last two groups would still be begun."""
    groups = phases.phases(dry=False)
    names = [each.name for group in groups for each in group]
    assert len(set(names)) == len(names)
    dry = {each.name for group in phases.phases(dry=True) for each in group}
    assert dry == set(names)
    first = sum(max(each.limit_s for each in group) for group in groups[:-1])
    assert first + groups[-1][0].least_s <= 570
