"""The kernels' benchmark counts what it should, makes the batches that it names, knows its own
reference to be right, and runs from start to end."""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_steer.kernels.guidance import TokenMap
from vllm_steer.kernels.guidance import reference as guidance_reference
from vllm_steer.kernels.lm_steer import reference as lm_steer_reference
from vllm_steer.kernels.lm_steer.block_sizes import tile_sizes

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
H200 = 4.3e12
"""Bytes per second of a copy on the card that the floors below are known for."""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def bench(module: Any) -> Any:
    """What a run on a CPU is made with."""
    make = module("operations.measure").Bench
    return make(CPU, torch.float32, repeats=2, reach=0, bandwidth=1e9, matmul=1e9)


def lm_steer_case(module: Any, **changes: Any) -> Any:
    """Eight rows, sixteen wide, in turn under two steers of rank 4."""
    sizes: dict[str, Any] = {"name": "case", "width": 16, "ranks": (4,), "rows": 8, "distinct": 2}
    return module("operations.lm_steer_cases").LMSteerCase(**sizes | changes)


@pytest.mark.parametrize(
    ("width", "rank", "rows", "distinct", "microseconds"),
    [
        pytest.param(4096, 1000, 1, 1, 3.8, id="one_row"),
        pytest.param(4096, 1000, 64, 1, 4.1, id="one_steer"),
        pytest.param(4096, 1000, 64, 4, 15.5, id="four_steers"),
        pytest.param(4096, 1000, 64, 32, 122, id="as_many_as_half_the_rows"),
        pytest.param(4096, 1000, 256, 32, 123, id="many_rows"),
        pytest.param(4096, 64, 64, 4, 1.2, id="low_rank"),
        pytest.param(1280, 1000, 64, 4, 3.1, id="dense"),  # 4 * 1280^2 * 2 bytes and the rows
    ],
)
def test_the_floor_of_an_lm_steer_is_its_weights_and_rows_once(
    module: Any, width: int, rank: int, rows: int, distinct: int, microseconds: float
) -> None:
    case = lm_steer_case(module, width=width, ranks=(rank,), rows=rows, distinct=distinct)
    assert case.floor_bytes(2) / H200 * 1e6 == pytest.approx(microseconds, rel=0.02)


def test_bytes_and_operations_of_an_lm_steer_in_numbers(module: Any) -> None:
    case = lm_steer_case(module)
    assert case.floor_bytes(2) == 4 * 2 * 16 * 4 + 4 * 8 * 16
    assert case.flops == 4 * 8 * 16 * 4
    dense = lm_steer_case(module, ranks=(12,))
    assert dense.dense
    assert dense.floor_bytes(2) == 2 * 2 * 16 * 16 + 4 * 8 * 16
    assert dense.flops == 2 * 8 * 16 * 16
    mixed = lm_steer_case(module, ranks=(2, 4), distinct=4, per_row=2)
    assert mixed.floor_bytes(2) == 4 * 16 * (2 + 4 + 2 + 4) + 4 * 8 * 16
    assert mixed.flops == 4 * 16 * 8 * (2 + 4)


@pytest.mark.parametrize(("tokens", "microseconds"), [(256, 0.98), (8192, 31.2)])
def test_the_floor_of_guidance_is_its_rows_in_and_out(
    module: Any, tokens: int, microseconds: float
) -> None:
    sizes = {"doses": 1, "directions": 0, "residual": False, "itemsize": 2}
    found = module("operations.floors").guidance_bytes(4096, steered=tokens, **sizes)
    assert found / H200 * 1e6 == pytest.approx(microseconds, rel=0.01)


def test_bytes_of_guidance_and_of_the_map_in_numbers(module: Any) -> None:
    floors = module("operations.floors")
    sizes = {"steered": 5, "doses": 2, "directions": 3, "itemsize": 2}
    assert floors.guidance_bytes(16, residual=True, **sizes) == 5 * 16 * 6 + 4 * 3 * 16 + 8 * 5 * 2
    found = floors.token_map_bytes(tokens=6, requests=3, layers=2, doses=4)
    written, rules, steps = 4 * 4 * 6 * (1 + 2), 4 * 3 * (48 + 8 + 8), 8 * 6 + 4 * 4
    assert found == written + rules + steps


def test_rows_take_the_steers_in_turn(module: Any) -> None:
    assert lm_steer_case(module).steers == ((0,), (1,)) * 4
    several = lm_steer_case(module, rows=3, distinct=3, per_row=2)
    assert several.steers == ((0, 1), (1, 2), (2, 0))


@pytest.mark.parametrize(("share", "steered"), [(0.0, 0), (0.01, 1), (0.5, 4), (1.0, 8)])
def test_a_share_of_the_rows_is_steered_spread_over_the_batch(
    module: Any, share: float, steered: int
) -> None:
    taken = [bool(steers) for steers in lm_steer_case(module, share=share).steers]
    assert sum(taken) == steered
    if share == 0.5:
        assert taken == [True, False] * 4


def test_the_kth_most_popular_steer_has_rows_in_proportion_to_one_over_k(module: Any) -> None:
    case = lm_steer_case(module, rows=250, distinct=4, popularity="zipf")
    found = Counter(steers[0] for steers in case.steers)
    assert [found[steer] for steer in range(4)] == [120, 60, 40, 30]


def test_the_grid_has_every_size_once_and_no_more_steers_than_rows(module: Any) -> None:
    cases = module("operations.lm_steer_cases")
    shapes = (cases.Shape(4096, 1000), cases.Shape(1280, 1000))
    found = list(cases.lm_steer_cases(shapes, (1, 8, 64), (1, 4, 32), 64))
    grid = [(c.width, c.rows, c.distinct) for c in found if c.name == "grid"]
    sizes = [(1, 1), (8, 1), (8, 4), (8, 8), (64, 1), (64, 4), (64, 32)]
    assert grid == [(shape.width, *size) for shape in shapes for size in sizes]
    special = Counter(c.name for c in found if c.width == 4096)
    assert special == {"grid": 7, "zipf": 1, "per_row": 2, "share": 3, "mixed": 1}
    (mixed,) = (c for c in found if c.name == "mixed")
    assert mixed.ranks == (8, 64, 256, 1000)


def test_a_shape_is_read_from_its_words(module: Any) -> None:
    shape = module("operations.lm_steer_cases").Shape
    assert shape.parse("4096x64") == shape(4096, 64)
    for text in ("4096", "4096x0", "ax1"):
        with pytest.raises(ValueError):
            shape.parse(text)


@pytest.mark.parametrize(
    ("set_bytes", "reach", "sets"),
    [(10, 0, 1), (100, 100, 1), (99, 100, 2), (10, 95, 10), (1, 10**9, 256)],
)
def test_sets_of_inputs_fill_the_cache(module: Any, set_bytes: int, reach: int, sets: int) -> None:
    assert module("operations.measure").sets_for(set_bytes, reach) == sets


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="factors"),
        pytest.param({"ranks": (12,)}, id="dense"),
        pytest.param({"ranks": (2, 4), "distinct": 4, "per_row": 2}, id="mixed"),
        pytest.param({"share": 0.5}, id="share"),
    ],
)
def test_the_fast_reference_of_lm_steer_is_the_written_out_one(
    module: Any, bench: Any, changes: dict[str, Any]
) -> None:
    inputs, case = module("operations.lm_steer_inputs"), lm_steer_case(module, **changes)
    table = inputs.make_bank(case.width, case.ranks, 2 * case.distinct, torch.float32, CPU)
    for given in inputs.input_sets(case, table, bench):
        found = inputs.exact(given.x, given.tables, given.steered)
        wanted = lm_steer_reference.steer_rows(given.x, given.tables, given.steered)
        torch.testing.assert_close(found.float(), wanted)


@pytest.mark.parametrize("mode", ["add", "rotate"])
def test_the_fast_reference_of_guidance_is_the_written_out_one(
    module: Any, bench: Any, mode: str
) -> None:
    guidance = module("operations.guidance")
    case = guidance.GuidanceCase("case", 5, 16, mode, doses=2, share=0.6)
    (given,) = guidance._input_sets(case, bench)
    wanted = given.before.clone()
    rest = (given.directions, given.layer, given.token_map, case.doses)
    guidance_reference.steer_tokens_(wanted, given.residual, *rest)
    torch.testing.assert_close(guidance._exact(given).float(), wanted)


@pytest.mark.parametrize(("tokens", "requests"), [(6, 6), (280, 4)])
def test_the_fast_reference_of_the_map_is_the_written_out_one(
    module: Any, tokens: int, requests: int
) -> None:
    maps = module("operations.token_map")
    case = maps.MapCase("case", tokens, requests, layers=3, doses=3)
    rules, starts, positions = maps.step_of(case, CPU)
    out = TokenMap(torch.zeros(3, tokens, dtype=torch.int32), torch.zeros(3, 3, tokens))
    guidance_reference.map_tokens(rules, starts, positions, out)
    directions, strengths = maps.exact(case, positions.numpy())
    assert np.array_equal(out.directions.numpy(), directions)
    np.testing.assert_allclose(out.strengths.numpy(), strengths, rtol=1e-6)
    assert len(np.unique(directions)) >= 3


def test_a_result_is_refused_if_it_is_wrong_unwritten_or_touches_others(module: Any) -> None:
    error = module("operations.measure").relative_error
    before, touched = torch.ones(3, 4), torch.tensor([True, False, True])
    wanted = before.double() + touched.double()[:, None]
    assert error(wanted.float(), wanted, before, touched) == 0
    spoilt = {
        "without a steer": wanted + 1e-3,
        "not changed": torch.cat([wanted[:2], before[2:].double()]),
        "relative error": torch.cat([wanted[:2], wanted[2:] * 1.01]),
        "relative error nan": wanted.where(~touched[:, None], torch.nan),
    }
    for message, found in spoilt.items():
        with pytest.raises(AssertionError, match=message):
            error(found.float(), wanted, before, touched)


def test_a_form_that_changes_its_mind_while_timed_fails(module: Any, bench: Any) -> None:
    measure = module("operations.measure")
    count = torch.zeros(1)
    work = measure.Work(lambda: (count.add_(1).clone(),), lambda found: 0.0)
    line = measure.form_line(bench, lambda: [work], floor_bytes=1, flops=0, matrix=False)
    assert "the timed result is not the one that was checked" in line["failed"]
    assert "us" not in line


def test_a_replay_is_checked_on_poisoned_results_and_fresh_inputs(module: Any) -> None:
    measure = module("operations.measure")
    hidden, out, whole = torch.ones(4), torch.ones(4), torch.ones(4, dtype=torch.int32)

    def replay() -> None:
        hidden.add_(1)
        out[:3] = 5.0

    graph = SimpleNamespace(replay=replay)
    works = [
        measure.Work(tuple, lambda found: 0.0, lambda: hidden.fill_(2.0)),
        measure.Work(tuple, lambda found: 0.0),
    ]
    measure._replay(graph, works, [(hidden,), (out, whole)])
    assert hidden.tolist() == [3.0] * 4
    assert out[:3].tolist() == [5.0] * 3 and out[3].isnan()
    assert whole.tolist() == [-1] * 4


def test_a_form_that_cannot_run_says_why(module: Any, bench: Any) -> None:
    measure = module("operations.measure")

    def refuse() -> Any:
        raise measure.Skipped("the reason")

    line = measure.form_line(bench, refuse, floor_bytes=1, flops=0, matrix=False)
    assert line == {"floor_bytes": 1, "flops": 0, "skipped": "the reason"}


def test_the_floor_is_the_longer_of_moving_and_multiplying(module: Any, bench: Any) -> None:
    against_floor = module("operations.measure").against_floor
    found = against_floor(4.0, 1000, 2000, bench, matrix=True)
    assert (found["floor_us"], found["bound"], found["share_of_floor"]) == (2.0, "arithmetic", 0.5)
    found = against_floor(4.0, 1000, 2000, bench, matrix=False)
    assert (found["floor_us"], found["bound"], found["share_of_floor"]) == (1.0, "memory", 0.25)


def test_median_and_spread_are_in_microseconds(module: Any) -> None:
    timing = module("timing")
    found = timing.summarise([3e-6, 1e-6, 6e-6, 2e-6, 4e-6, 5e-6])
    assert (found.median, found.p20, found.p80, found.fastest) == pytest.approx((3.5, 2, 5, 1))


def test_after_its_time_a_run_begins_nothing_more_and_says_what_it_left_out(
    module: Any, bench: Any
) -> None:
    measure, late = module("operations.measure"), replace(bench, until=0.0)
    grid = module("bench_kernels").QUICK
    lines = [
        *module("operations.lm_steer").run(grid.lm_steer_cases(), late),
        *module("operations.guidance").run(grid.guidance_cases(), late),
        *module("operations.token_map").run(grid.map_cases(), late),
        *module("operations.routing").run(grid.routing_cases(), late),
    ]
    assert {line["section"] for line in lines} == {"lm_steer", "guidance", "map", "host"}
    assert {line["skipped"] for line in lines} == {measure.NO_TIME}
    assert {"torch_groups", "addmm"} < {line["form"] for line in lines}


def test_a_run_that_is_ended_has_written_every_line(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, path = module("bench_kernels"), tmp_path / "new" / "result.json"

    def interrupted(args: Any, bench: Any) -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"section": "map", "number": number}
            found = json.loads(path.read_text())
            assert [line["number"] for line in found["rows"]] == list(range(number + 1))
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "_lines", interrupted)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--quick", "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    found = json.loads(path.read_text())
    assert (len(found["rows"]), found["complete"]) == (3, False)
    assert found["bandwidth_gb_s"] > 0


def test_the_short_grid_is_what_decides_about_the_kernels(module: Any) -> None:
    grid = module("bench_kernels").SHORT
    sizes = [(1, 1), (64, 1), (64, 4), (64, 32), (256, 1), (256, 4), (256, 32)]
    found = [(case.width, case.ranks, case.rows, case.distinct) for case in grid.lm_steer_cases()]
    assert found == [(4096, (rank,), *size) for rank in (1000, 64) for size in sizes]
    guided = [(case.mode, case.tokens) for case in grid.guidance_cases()]
    assert guided == [("add", 64), ("add", 8192), ("rotate", 64), ("rotate", 8192)]
    assert [(case.name, case.tokens) for case in grid.map_cases()] == [("decode", 256)]
    assert grid.routing_cases() == []


def test_every_variant_is_another_choice_of_blocks_for_a_bank_of_the_short_grid(
    module: Any,
) -> None:
    forms = module("operations.lm_steer_forms")
    for name, options in forms.VARIED.items():
        usual, other = (
            [tile_sizes(4096, rank, 2, **varied) for rank in (64, 1000)] for varied in ({}, options)
        )
        assert usual != other, name
    assert {f"tiles_{name}" for name in forms.VARIED} == set(forms.VARIANTS)


def test_a_form_beside_another_says_whether_it_gives_its_bits(module: Any, bench: Any) -> None:
    forms, run = module("operations.lm_steer_forms"), module("operations.lm_steer").run
    groups = forms.FORMS["torch_groups"]
    given = {
        "same": replace(groups, beside=groups.prepare),
        "other": replace(groups, beside=lambda inputs: lambda: inputs.x),
        "usual": groups,
    }
    found = {
        line["form"]: line.get("same_bits") for line in run([lm_steer_case(module)], bench, given)
    }
    assert found == {"same": True, "other": False, "usual": None}


@pytest.mark.matrix
def test_the_short_grid_runs_from_start_to_end(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ["--grid", "short", "--quick", "--variants", "--repeats", "2", "--seconds", "300"]
    command = [sys.executable, "benchmarks/bench_kernels.py", *options, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(path.read_text())
    assert found["complete"]
    timed = {(line["section"], line["form"]) for line in found["rows"] if "us" in line}
    on_card = torch.cuda.is_available()
    tiles, ours = ("triton_tiles", "triton") if on_card else ("torch_groups", "torch")
    assert {
        ("lm_steer", tiles),
        ("lm_steer", "addmm"),
        ("guidance", ours),
        ("map", ours),
    } <= timed
    for line in found["rows"]:
        assert ("us" in line) != ("skipped" in line), line
        assert "us" not in line or {"floor_us", "share_of_floor"} <= set(line)
        assert "us" not in line or not on_card or {"eager_us", "host_us"} <= set(line)
    variants = [line for line in found["rows"] if line["form"].startswith("tiles_")]
    assert len(variants) == 6 * 3


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("kernels") / "result.json"
    command = [sys.executable, "benchmarks/bench_kernels.py", "--quick", "--json", str(path)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(path.read_text())


@pytest.mark.matrix
def test_a_result_says_where_and_with_what_it_was_measured(result: dict[str, Any]) -> None:
    assert {"machine", "versions", "git", "command", "date", "threads"} <= set(result)
    assert (result["benchmark"], result["dtype"]) == ("kernels", "bfloat16")
    assert result["bandwidth_gb_s"] > 0 and result["matmul_tflops"] > 0


@pytest.mark.matrix
def test_every_section_has_times_or_reasons(result: dict[str, Any]) -> None:
    timed = Counter(row["section"] for row in result["rows"] if "us" in row)
    assert set(timed) == {"lm_steer", "guidance", "map", "divergence", "host"}
    for row in result["rows"]:
        assert ("us" in row) != bool(row.get("skipped")), row
        assert "failed" not in row
        if "us" in row:
            assert 0 < row["us_p20"] <= row["us"] <= row["us_p80"]
        if "floor_us" in row:
            assert row["floor_us"] >= 0 and row["error"] <= 1e-2


@pytest.mark.matrix
@pytest.mark.skipif(torch.cuda.is_available(), reason="times of Triton are there on a card")
def test_without_a_card_no_time_is_made_up_for_triton(result: dict[str, Any]) -> None:
    device = [row for row in result["rows"] if row["section"] != "host"]
    triton = [row for row in device if row["form"].startswith(("triton", "vllm"))]
    assert triton and not any("us" in row for row in triton)
    assert all(row["method"] == "clock" for row in result["rows"] if "us" in row)
