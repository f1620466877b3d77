"""The test results of each vLLM version (``make test-version``) as a Markdown table."""

from typing import Any

from packaging.version import Version

from benchmarks.table import grid

RUNS = {
    "v1": "engine V1",
    "v2": "engine V2",
    "v1-matrix": "matrix V1",
    "v2-matrix": "matrix V2",
    "http": "servers",
    "kernels": "kernels alone",
}
WITH = ("torch", "triton", "transformers", "python")


def versions(results: list[dict[str, Any]]) -> str:
    """A row per vLLM version, a column per run; then skipped tests with reasons, and failures."""
    results = sorted(results, key=lambda result: Version(result["vllm"]))
    names = [name for name in RUNS if any(name in result["runs"] for result in results)]
    heads = ["vLLM", *(RUNS[name] for name in names), "with", "commit, date"]
    lines = [
        [
            result["vllm"],
            *(_counts(result["runs"].get(name)) for name in names),
            _environment(result),
            _origin(result),
        ]
        for result in results
    ]
    notes = [*_skipped(results), *_failed(results)]
    return "\n".join([*grid(heads, lines), *(["", *notes] if notes else [])])


def _counts(run: dict[str, Any] | None) -> str:
    """The counts of a run; tests that did not pass are named."""
    if run is None:
        return "not run"
    parts = [f"{run['passed']} passed"]
    parts += [f"{run[key]} {key}" for key in ("failed", "skipped") if run[key]]
    if run["exit_code"] not in (0, 1):
        parts.append(f"broken off ({run['exit_code']})")
    return ", ".join(parts)


def _environment(result: dict[str, Any]) -> str:
    """The relevant packages, each with all versions of the runs."""
    libraries = [
        (name, sorted({str(run["versions"][name]) for run in result["runs"].values()}))
        for name in WITH
    ]
    return ", ".join(f"{name} {' or '.join(versions)}" for name, versions in libraries)


def _origin(result: dict[str, Any]) -> str:
    """The tested commits and the last date."""
    runs = result["runs"].values()
    commits = {(run["git"]["commit"] or "unknown")[:12] for run in runs}
    changed = " and local changes" if any(run["git"]["dirty"] for run in runs) else ""
    return f"{', '.join(sorted(commits))}{changed}, {max(run['date'] for run in runs)[:10]}"


def _skipped(results: list[dict[str, Any]]) -> list[str]:
    """Each reason for skipped tests, with the runs and counts."""
    runs_by_reason: dict[str, list[str]] = {}
    for result in results:
        for name, run in _in_order(result):
            for reason, tests in run["skips"].items():
                run_name = f"{result['vllm']} {RUNS[name]} ({len(tests)})"
                runs_by_reason.setdefault(reason, []).append(run_name)
    return [f"- skipped, {reason}: {'; '.join(runs)}" for reason, runs in runs_by_reason.items()]


def _failed(results: list[dict[str, Any]]) -> list[str]:
    """The name of every test that failed."""
    return [
        f"- failed, {result['vllm']} {RUNS[name]}: `{test}`"
        for result in results
        for name, run in _in_order(result)
        for test in run["failures"]
    ]


def _in_order(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A version's runs, in the order of the columns."""
    return [(name, result["runs"][name]) for name in RUNS if name in result["runs"]]
