"""The run on a GPU by phases: limits, omitted phases, summary."""

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
    """Run these phases; returns the exit code and the phases of the summary by name."""
    out = pack.parent / "out"
    monkeypatch.setattr(run, "phases", lambda dry: groups)
    monkeypatch.setattr(run, "GRACE_S", 1)
    monkeypatch.setattr(sys, "argv", ["run.py", str(pack), str(out), *options])
    code = run.main()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pack"] == {"git": {"commit": "abc"}}
    return code, {phase["phase"]: phase for phase in summary["phases"]}


def phase(name: str, code: str, limit_s: float = 20, **fields: Any) -> Any:
    return phases.Phase(name, ("-c", code, "{json}"), limit_s, **fields)


def test_a_failure_stops_no_other_phase(
    pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    passing_code = (
        'import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(\'{"summary": "right"}\')'
    )
    table = passing_code.replace('"summary": "right"', '"rows": [1, 2], "left_out": [3]')
    bad = "print('first'); raise SystemExit('the last line')"
    groups = [[phase("bad", bad)], [phase("good", passing_code), phase("table", table)]]
    code, states = serve(pack, monkeypatch, groups)
    assert code == 1
    assert (states["bad"]["state"], states["bad"]["said"]) == ("exit 1", "the last line")
    assert (states["good"]["state"], states["good"]["said"]) == ("ok", "right")
    assert states["table"]["said"] == "2 lines, 1 left out"
    output = capsys.readouterr().out
    assert output.index("SUMMARY") < output.rindex("bad") < output.rindex("good")


def test_a_hanging_phase_is_ended_with_its_child_processes(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a phase that ignores SIGTERM."""
    child = "import time; time.sleep(60)"
    hangs = (
        "import pathlib, signal, subprocess, sys, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        'pathlib.Path(sys.argv[1]).write_text(\'{"summary": "child %d"}\' % p.pid); time.sleep(60)'
    )
    begun = time.monotonic()
    groups = [[phase("hangs", hangs, limit_s=8, least_s=0)], [phase("next", "")]]
    code, states = serve(pack, monkeypatch, groups)
    assert code == 1 and time.monotonic() - begun < 40
    assert states["hangs"]["state"] == "stopped at its limit of 8 s"
    assert states["next"]["state"] == "ok"
    pid = int(states["hangs"]["said"].split()[-1])
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_phase_without_time_is_reported_as_left_out(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [
        [phase("long", "", limit_s=100, least_s=50)],
        [phase("short", "", least_s=1)],
    ]
    code, states = serve(pack, monkeypatch, groups, "--seconds", "30")
    assert code == 1
    assert [states[name]["state"] for name in ("long", "short")] == ["left out", "ok"]


def test_phases_by_name_and_caches_of_their_own(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows = (
        "import json, os, pathlib, sys; e = os.environ;"
        "said = e['VLLM_CACHE_ROOT'] + ' ' + e['PYTHONPATH'];"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps({'summary': said}))"
    )
    groups = [[phase("a", shows), phase("b", "raise SystemExit(1)")]]
    code, states = serve(pack, monkeypatch, groups, "--only", "a")
    assert code == 0 and states.keys() == {"a"}
    cache, path = states["a"]["said"].split()
    assert cache.endswith("caches/a") and str(pack.parent) not in cache
    assert path.split(os.pathsep)[0] == str(pack / "site")


def test_the_limits_of_a_run_on_a_card_fit_the_time_that_it_has() -> None:
    """If every phase needs its limit, all groups except the last two still start."""
    groups = phases.phases(dry=False)
    names = [phase.name for group in groups for phase in group]
    assert len(set(names)) == len(names)
    dry = {phase.name for group in phases.phases(dry=True) for phase in group}
    assert dry == set(names)
    first = sum(max(phase.limit_s for phase in group) for group in groups[:-1])
    assert first + groups[-1][0].least_s <= 570
