"""LM-Steer on the device: every form on every case."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import torch

from operations.lm_steer_cases import LMSteerCase
from operations.lm_steer_forms import FORMS, Form
from operations.lm_steer_inputs import (
    Inputs,
    batch,
    exact,
    input_sets,
    make_bank,
    slots_for,
)
from operations.measure import NO_TIME, Bench, Tensors, Work, form_line, relative_error
from operations.vllm_lora import forget_weights
from vllm_steer.bank import Shelf
from vllm_steer.serving.pairs import Uses, steered_rows

NOTHING = "no row is steered: nothing is launched"


def run(
    cases: list[LMSteerCase], bench: Bench, forms: Mapping[str, Form] = FORMS
) -> Iterator[dict[str, Any]]:
    """A line per case and form; cases with the same steers share one bank."""
    for (width, ranks), group in groupby(cases, key=lambda case: (case.width, case.ranks)):
        mine, shelf = list(group), None
        for case in mine:
            if shelf is None and not bench.out_of_time:
                slots = slots_for(mine, bench.dtype.itemsize, bench.reach)
                shelf = make_bank(width, ranks, slots, bench.dtype, bench.device)
            yield from _case_lines(case, shelf, bench, forms)


def _case_lines(
    case: LMSteerCase, shelf: Shelf | None, bench: Bench, forms: Mapping[str, Form]
) -> Iterator[dict[str, Any]]:
    head = _columns(case) | {"dtype": str(bench.dtype).removeprefix("torch.")}
    if shelf is None or bench.out_of_time:
        yield from (head | {"form": name, "skipped": NO_TIME} for name in forms)
        return
    if not any(case.steers):
        rows, requests = batch(case)
        assert steered_rows(rows, Uses(shelf, requests)) is None
        yield head | {"form": "all", "skipped": NOTHING}
        return
    sets = list(input_sets(case, shelf, bench))
    size = {"floor_bytes": case.floor_bytes(bench.dtype.itemsize), "flops": case.flops}
    for name, form in forms.items():
        works = partial(_works, form, sets)
        found = form_line(bench, works, **size, matrix=True, repeatable=form.repeatable)
        forget_weights()
        if form.beside is not None and "us" in found:
            found["same_bits"] = torch.equal(form.prepare(sets[0])(), form.beside(sets[0])())
        yield head | {"form": name} | found


def _works(form: Form, sets: list[Inputs]) -> list[Work]:
    return [_work(form, form.inputs(inputs)) for inputs in sets]


def _work(form: Form, inputs: Inputs) -> Work:
    call = form.prepare(inputs)
    touched = torch.zeros(inputs.case.rows, dtype=torch.bool)
    touched[torch.from_numpy(inputs.steered.rows)] = True
    return Work(lambda: (call(),), partial(_check, inputs, touched.to(inputs.device)))


def _check(inputs: Inputs, touched: torch.Tensor, results: Tensors) -> float:
    wanted = exact(inputs.x, inputs.tables, inputs.steered)
    return relative_error(results[0], wanted, inputs.x, touched)


def _columns(case: LMSteerCase) -> dict[str, Any]:
    return {
        "section": "lm_steer",
        "case": case.name,
        "width": case.width,
        "rank": max(case.ranks),
        "stored": "dense" if case.dense else "factors",
        "rows": case.rows,
        "distinct": len({steer for row in case.steers for steer in row}),
        "per_row": case.per_row,
        "share": case.share,
    }
