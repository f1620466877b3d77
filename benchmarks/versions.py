"""Which vLLM was tested how far: the results of ``make test-version`` as a markdown table."""

from typing import Any

from packaging.version import Version
from table import grid

RUNS = {
    "v1": "engine, V1",
    "v2": "engine, V2",
    "v1-matrix": "longer matrix, V1",
    "v2-matrix": "longer matrix, V2",
    "http": "servers",
    "kernels": "kernels alone",
}
WITH = ("torch", "triton", "transformers", "python")


def versions(results: list[dict[str, Any]]) -> str:
    """A row per vLLM and a column per run, then what was skipped, and why, and what failed."""
    results = sorted(results, key=lambda result: Version(result["vllm"]))
    shown = [name for name in RUNS if any(name in result["runs"] for result in results)]
    heads = ["vLLM", *(RUNS[name] for name in shown), "with", "commit, date"]
    lines = [
        [
            result["vllm"],
            *(_counts(result["runs"].get(name)) for name in shown),
            _environment(result),
            _origin(result),
        ]
        for result in results
    ]
    table = "\n".join(grid(heads, lines))
    notes = [note for result in results for note in _notes(result)]
    return "\n\n".join([table, "\n".join(notes)]) if notes else table


def _counts(run: dict[str, Any] | None) -> str:
    """What came of a run; whatever did not pass is named."""
    if run is None:
        return "not run"
    parts = [f"{run['passed']} passed"]
    parts += [f"{run[key]} {key}" for key in ("failed", "skipped") if run[key]]
    if run["exit_code"] not in (0, 1):
        parts.append(f"broken off ({run['exit_code']})")
    return ", ".join(parts)


def _environment(result: dict[str, Any]) -> str:
    """The packages that decide, each with every version that some run had."""
    found = [
        (name, sorted({str(run["versions"][name]) for run in result["runs"].values()}))
        for name in WITH
    ]
    return ", ".join(f"{name} {' or '.join(versions)}" for name, versions in found)


def _origin(result: dict[str, Any]) -> str:
    """The commits that were tested and the last day."""
    runs = result["runs"].values()
    commits = {(run["git"]["commit"] or "unknown")[:12] for run in runs}
    changed = " and local changes" if any(run["git"]["dirty"] for run in runs) else ""
    return f"{', '.join(sorted(commits))}{changed}, {max(run['date'] for run in runs)[:10]}"


def _notes(result: dict[str, Any]) -> list[str]:
    """Every reason for which tests were skipped, and the name of each that failed."""
    notes = []
    for name, run in result["runs"].items():
        where = f"{result['vllm']}, {RUNS[name]}"
        notes += [
            f"- {where}: {len(tests)} skipped: {reason}." for reason, tests in run["skips"].items()
        ]
        notes += [f"- {where}: failed: `{test}`." for test in run["failures"]]
    return notes
