"""What the host does once per composition of a batch: pairs of row and slot, then their tables.

Timed by the host's clock. On a CUDA device that includes issuing the copy, but not waiting for it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import timing

from operations.lm_steer_cases import LMSteerCase
from operations.lm_steer_inputs import batch, make_bank
from operations.measure import NO_TIME, Bench
from vllm_steer.bank import Shelf
from vllm_steer.kernels.lm_steer import LMSteerForm, SteeredRows
from vllm_steer.serving.pairs import Uses, steered_rows

WIDTH, RANK = 64, 16
GOAL_US = 50.0


def routing_cases(rows: Sequence[int], distinct: Sequence[int]) -> Iterator[LMSteerCase]:
    """Batches that are all steered, then 2 and 4 steers per row, then shares of steered rows."""
    size, most = (WIDTH, (RANK,)), max(distinct)
    for count in rows:
        for steers in distinct:
            yield LMSteerCase("grid", *size, count, min(steers, count))
        for per_row in (2, 4):
            yield LMSteerCase("per_row", *size, count, most, per_row)
        for share in (0.0, 0.01, 0.5):
            yield LMSteerCase("share", *size, count, min(most, count), share=share)


def run(cases: Sequence[LMSteerCase], bench: Bench) -> Iterator[dict[str, Any]]:
    """A line per case and form."""
    if not cases:
        return
    slots = max(case.distinct for case in cases)
    shelf = make_bank(WIDTH, (RANK,), slots, bench.dtype, bench.device)
    for case in cases:
        if bench.out_of_time:
            yield from (_columns(case) | {"form": name, "skipped": NO_TIME} for name in _forms())
            continue
        rows, requests = batch(case)
        _check(case, steered_rows(rows, Uses(shelf, requests)))
        for name, form in _forms().items():
            yield _columns(case) | {"form": name} | _measured(case, shelf, form, bench)


def _measured(case: LMSteerCase, shelf: Shelf, form: LMSteerForm, bench: Bench) -> dict[str, Any]:
    """``us`` in all, of which ``place_us`` are the form's own."""
    rows, requests = batch(case)
    uses = Uses(shelf, requests)
    pairs = steered_rows(rows, uses)

    def place(found: SteeredRows | None) -> None:
        if found is not None:
            form.place(found, shelf.tables, bench.device)

    total = _times(lambda: place(steered_rows(rows, uses)), bench)
    return {
        "us": round(total.median, 2),
        "us_p20": round(total.p20, 2),
        "us_p80": round(total.p80, 2),
        "place_us": round(_times(lambda: place(pairs), bench).median, 2),
        "goal_us": GOAL_US,
    }


def _times(call: Callable[[], Any], bench: Bench) -> timing.Times:
    """Each call by itself: a step of an engine makes one, with other work between."""
    timing.sync(bench.device)
    call()
    return timing.summarise([timing.on_clock(call, 1) for _ in range(20 * bench.repeats)])


def _forms() -> dict[str, LMSteerForm]:
    """The forms whose tables differ; the Triton one is placed without a card as well."""
    from vllm_steer.kernels.lm_steer import grouped
    from vllm_steer.kernels.lm_steer.by_tile import BY_TILE

    return {"triton_tiles": BY_TILE, "torch_groups": grouped}


def _check(case: LMSteerCase, pairs: SteeredRows | None) -> None:
    """Every pair against a loop over the rows, in order of slot, then of row."""
    wanted = sorted((slot, row) for row, slots in enumerate(case.steers) for slot in slots)
    if pairs is None:
        assert not wanted, "no pairs for a batch with steered rows"
        return
    found = [
        (slot, int(pairs.rows[pair]))
        for slot, start, end in pairs.groups
        for pair in range(start, end)
    ]
    assert found == wanted, "the pairs are not those of the batch"
    scales = [0.5 + (row + slot) % 7 / 8 for slot, row in wanted]
    assert pairs.scales.tolist() == scales, "a pair has another scale"


def _columns(case: LMSteerCase) -> dict[str, Any]:
    return {
        "section": "host",
        "case": case.name,
        "rows": case.rows,
        "distinct": case.distinct,
        "per_row": case.per_row,
        "share": case.share,
        "method": "clock",
    }
