"""The runs of the load as a Markdown table: what was sent, what came of it."""

from collections.abc import Mapping
from typing import Any

from benchmarks.table import grid

_HEADS = (
    *("server", "requests", "equal", "left early", "refused", "loads", "unloads", "preempted"),
    *("memory", "faults", "commit, date"),
)


def soak(results: list[dict[str, Any]]) -> str:
    """A row per server; below it what was sent that is bad."""
    loads = [result for result in results if result["benchmark"] == "soak"]
    loads.sort(key=lambda result: (result.get("unsteered", False), result["configuration"]))
    lines = [_line(result, row) for result in loads for row in result["rows"]]
    bad = [result for result in results if result["benchmark"] == "bad-input"]
    notes = [_bad(result, row) for result in bad for row in result["rows"]]
    return "\n".join([*grid(list(_HEADS), lines), *(["", *notes] if notes else [])])


def _line(result: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    outcomes, changes = row["outcomes"], row["changes"]
    name = result["configuration"] + (", unsteered" if result.get("unsteered", False) else "")
    return [
        name,
        f"{row['requests']:,}",
        f"{_sum(outcomes, ': equal'):,}",
        f"{_sum(outcomes, ': left'):,}",
        f"{_sum(outcomes, ': refused'):,}",
        f"{_sum(changes, 'load_steer 200') - _sum(changes, 'unload_steer 200')}",
        f"{_sum(changes, 'unload_steer 200')}",
        f"{row['preemptions']:.0f}",
        _memory(row["memory"]),
        str(row["num_faults"]),
        _origin(result),
    ]


def _sum(counts: Mapping[str, int], part: str) -> int:
    return sum(count for name, count in counts.items() if part in name)


def _memory(memory: Mapping[str, Mapping[str, Any]]) -> str:
    """By kind of process, the largest change from the second to the last fifth."""
    changes: dict[str, float] = {}
    for name, one in memory.items():
        kind = "workers" if name.startswith("VLLM::Worker") else "others"
        change = 100 * (one["last_fifth_mib"] / one["second_fifth_mib"] - 1)
        changes[kind] = max(changes.get(kind, change), change)
    return ", ".join(f"{kind} {change:+.1f} %" for kind, change in sorted(changes.items()))


def _bad(result: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return (
        f"Bad input, to the middleware on fake engines: {row['bad_requests']:,} requests, "
        f"{row['damaged_files']:,} damaged files, of which {row['damaged_files_that_are_steers']} "
        f"still were steers; {row['num_faults']} faults ({_origin(result)})."
    )


def _origin(result: Mapping[str, Any]) -> str:
    return f"{(result['git']['commit'] or 'none')[:12]}, {result['date'][:10]}"
