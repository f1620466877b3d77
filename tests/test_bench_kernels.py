"""The benchmark of the kernels: byte counts, batches, its reference, and a complete run."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import bench_kernels
from benchmarks.operations import guidance, lm_steer, measure
from benchmarks.operations.lm_steer import LMSteerCase
from benchmarks.operations.measure import MeasurementSetup, sets_for
from vllm_steer.kernels.guidance import reference as guidance_reference
from vllm_steer.kernels.lm_steer import reference as lm_steer_reference
from vllm_steer.kernels.lm_steer.block_sizes import tile_sizes

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
H200 = 4.3e12
"""Bytes per second of a copy on the card that the floors below are known for."""


@pytest.fixture
def bench() -> MeasurementSetup:
    """The setup of a run on a CPU."""
    return MeasurementSetup(CPU, torch.float32, repeats=2, reach=0, bandwidth=1e9, matmul=1e9)


CASE = LMSteerCase(width=16, rank=4, rows=8, distinct=2)


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
def test_the_floor_of_an_lm_steer_counts_its_weights_and_rows_once(
    width: int, rank: int, rows: int, distinct: int, microseconds: float
) -> None:
    case = LMSteerCase(width, rank, rows, distinct)
    assert case.floor_bytes(2) / H200 * 1e6 == pytest.approx(microseconds, rel=0.02)


def test_bytes_and_operations_of_an_lm_steer_in_numbers() -> None:
    assert CASE.floor_bytes(2) == 4 * 2 * 16 * 4 + 4 * 8 * 16
    assert CASE.flops == 4 * 8 * 16 * 4
    dense = replace(CASE, rank=12)
    assert dense.dense
    assert dense.floor_bytes(2) == 2 * 2 * 16 * 16 + 4 * 8 * 16
    assert dense.flops == 2 * 8 * 16 * 16


@pytest.mark.parametrize(("tokens", "microseconds"), [(256, 1.0), (8192, 31.2)])
def test_the_floor_of_guidance_counts_its_rows_in_and_out(tokens: int, microseconds: float) -> None:
    floor = guidance.GuidanceCase("add", tokens, 4096, doses=1).floor_bytes(2)
    assert floor / H200 * 1e6 == pytest.approx(microseconds, rel=0.02)


def test_bytes_of_guidance_in_numbers() -> None:
    case = guidance.GuidanceCase("rotate", 5, 16, doses=2)
    assert case.floor_bytes(2) == 5 * 16 * 6 + 4 * 6 * 16 + 8 * 5 * 2


def test_rows_take_the_steers_of_their_set_in_turn(bench: MeasurementSetup) -> None:
    table = lm_steer.make_bank(CASE, 4, torch.float32, CPU)
    pairs = lm_steer.batch(CASE, table, nth=1)
    rows_of_slots = {slot: pairs.rows[start:end].tolist() for slot, start, end in pairs.groups}
    assert rows_of_slots == {2: [0, 2, 4, 6], 3: [1, 3, 5, 7]}


def test_the_grid_has_every_size_once_and_no_more_steers_than_rows() -> None:
    cases = [case for case in bench_kernels.FULL.cases() if case.section == "lm_steer"]
    case_sizes = [(case.width, case.rank, case.rows, case.distinct) for case in cases]
    sizes = [(1, 1), (8, 1), (8, 4), (8, 8), (64, 1), (64, 4), (64, 32)]
    shapes = ((1280, 1000), (4096, 64), (4096, 1000))
    assert case_sizes == [(*shape, *size) for shape in shapes for size in sizes]


@pytest.mark.parametrize(
    ("set_bytes", "reach", "sets"),
    [(10, 0, 1), (100, 100, 1), (99, 100, 2), (10, 95, 10), (1, 10**9, 256)],
)
def test_sets_of_inputs_fill_the_cache(set_bytes: int, reach: int, sets: int) -> None:
    assert sets_for(set_bytes, reach) == sets


@pytest.mark.parametrize("rank", [4, 12], ids=["factors", "dense"])
def test_the_fast_reference_of_lm_steer_equals_the_float64_reference(
    bench: MeasurementSetup, rank: int
) -> None:
    for inputs in replace(CASE, rank=rank).sets(replace(bench, reach=2000)):
        expected = lm_steer_reference.steer_rows(inputs.x, inputs.tables, inputs.steered)
        torch.testing.assert_close(inputs.exact.float(), expected)


@pytest.mark.parametrize("mode", ["add", "rotate"])
def test_the_fast_reference_of_guidance_equals_the_float64_reference(
    bench: MeasurementSetup, mode: Any
) -> None:
    case = guidance.GuidanceCase(mode, 5, 16, doses=2)
    (inputs,) = case.sets(bench)
    expected = inputs.before.clone()
    rest = (inputs.directions, inputs.layer, inputs.token_map, case.doses)
    guidance_reference.steer_tokens_(expected, inputs.residual, *rest)
    torch.testing.assert_close(inputs.exact.float(), expected)


def test_a_result_is_refused_if_it_is_wrong_unwritten_or_touches_others() -> None:
    error = measure.relative_error
    before, touched = torch.ones(3, 4), torch.tensor([True, False, True])
    expected = before.double() + touched.double()[:, None]
    assert error(expected.float(), expected, before, touched) == 0
    spoilt = {
        "without a steer": expected + 1e-3,
        "not changed": torch.cat([expected[:2], before[2:].double()]),
        "relative error": torch.cat([expected[:2], expected[2:] * 1.01]),
        "relative error nan": expected.where(~touched[:, None], torch.nan),
    }
    for message, spoilt_result in spoilt.items():
        with pytest.raises(AssertionError, match=message):
            error(spoilt_result.float(), expected, before, touched)


@dataclass
class OneWork(measure.OperationCase):
    """A case of one set, with this work or for that reason without."""

    operation: measure.Operation | None = None
    section = "x"
    case = "one"
    columns: ClassVar = {"section": "x"}

    def floor_bytes(self, itemsize: int) -> int:
        return 1

    def sets(self, bench: MeasurementSetup) -> list[int]:
        return [0]

    def work(self, form: str, inputs: int) -> measure.Operation:
        if self.operation is None:
            raise measure.Skipped("the reason")
        return self.operation


def test_a_form_whose_result_changes_while_timed_fails(bench: MeasurementSetup) -> None:
    count = torch.zeros(1)
    work = measure.Operation(lambda: (count.add_(1).clone(),), lambda _result: 0.0)
    (line,) = measure.lines(OneWork(work), ["form"], bench)
    assert "the timed result is not the one that was checked" in line["failed"]
    assert "us" not in line


def test_a_replay_is_checked_on_poisoned_results_and_fresh_inputs() -> None:
    hidden, out, whole = torch.ones(4), torch.ones(4), torch.ones(4, dtype=torch.int32)

    def replay() -> None:
        hidden.add_(1)
        out[:3] = 5.0

    graph = SimpleNamespace(replay=replay)
    works = [
        measure.Operation(tuple, lambda _result: 0.0, lambda: hidden.fill_(2.0)),
        measure.Operation(tuple, lambda _result: 0.0),
    ]
    measure._replay(graph, works, [(hidden,), (out, whole)])
    assert hidden.tolist() == [3.0] * 4
    assert out[:3].tolist() == [5.0] * 3 and out[3].isnan()
    assert whole.tolist() == [-1] * 4


def test_a_form_that_cannot_run_has_a_reason(bench: MeasurementSetup) -> None:
    (line,) = measure.lines(OneWork(), ["form"], bench)
    assert line == {"section": "x", "dtype": "float32", "form": "form", "skipped": "the reason"}


def test_the_floor_is_the_longer_of_memory_and_arithmetic_time(bench: MeasurementSetup) -> None:
    result = measure.against_floor(4.0, 1000, 2000, bench)
    assert (result["floor_us"], result["bound"], result["share_of_floor"]) == (
        2.0,
        "arithmetic",
        0.5,
    )
    result = measure.against_floor(4.0, 1000, 0, bench)
    assert (result["floor_us"], result["bound"], result["share_of_floor"]) == (
        1.0,
        "memory",
        0.25,
    )


def test_a_run_past_its_time_limit_lists_the_cases_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "result.json"
    options = ["--quick", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *options])
    with pytest.raises(SystemExit, match=r"0|False"):
        bench_kernels.main()
    result = json.loads(path.read_text())
    assert result["rows"] == [] and result["bandwidth_gb_s"] > 0
    grid = replace(bench_kernels.FULL, **bench_kernels.TINY)
    assert result["left_out"] == [case.columns for case in grid.cases()]


def test_an_interrupted_run_has_written_every_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"

    def interrupted(case: Any, forms: Any, bench: Any) -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"number": number, "skipped": "so"}
            result = json.loads(path.read_text())
            assert [line["number"] for line in result["rows"]] == list(range(number + 1))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_kernels, "lines", interrupted)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--quick", "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        bench_kernels.main()
    assert len(json.loads(path.read_text())["rows"]) == 3


def test_the_short_grid_has_the_cases_that_select_the_kernels() -> None:
    cases: dict[str, list[Any]] = {}
    for case in bench_kernels.SHORT.cases():
        cases.setdefault(case.section, []).append(case)
    sizes = [(1, 1), (64, 1), (64, 4), (64, 32), (256, 1), (256, 4), (256, 32)]
    case_sizes = [(case.width, case.rank, case.rows, case.distinct) for case in cases["lm_steer"]]
    assert case_sizes == [(4096, rank, *size) for rank in (1000, 64) for size in sizes]
    guided = [(case.case, case.rows) for case in cases["guidance"]]
    assert guided == [("add", 64), ("add", 8192), ("rotate", 64), ("rotate", 8192)]
    assert [case.doses for case in cases["divergence"]] == [1, 64]


def test_every_variant_is_another_choice_of_blocks_for_a_bank_of_the_short_grid() -> None:
    for name, options in lm_steer.VARIED.items():
        usual, other = (
            [tile_sizes(4096, rank, 2, **varied) for rank in (64, 1000)] for varied in ({}, options)
        )
        assert usual != other, name
    assert {f"tiles_{name}" for name in lm_steer.VARIED} == set(lm_steer.VARIANTS)


@pytest.mark.matrix
def test_the_short_grid_runs_from_start_to_end(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ["--grid", "short", "--quick", "--variants", "--seconds", "300"]
    command = [sys.executable, "-m", "benchmarks.bench_kernels", *options, "--json", str(path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-6000:]
    result = json.loads(path.read_text())
    assert result["left_out"] == []
    timed = {(line["section"], line["form"]) for line in result["rows"] if "us" in line}
    on_card = torch.cuda.is_available()
    tiles, chosen = ("triton_tiles", "triton") if on_card else ("torch_groups", "torch")
    assert {
        ("lm_steer", tiles),
        ("lm_steer", "addmm"),
        ("guidance", chosen),
        ("divergence", chosen),
    } <= timed
    for line in result["rows"]:
        assert ("us" in line) != ("skipped" in line), line
        assert "us" not in line or {"floor_us", "share_of_floor"} <= set(line)
        assert "us" not in line or not on_card or "host_us" in line
    variants = [line for line in result["rows"] if line["form"].startswith("tiles_")]
    assert len(variants) == 6 * 2 * 3


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("kernels") / "result.json"
    command = [sys.executable, "-m", "benchmarks.bench_kernels", "--quick", "--json", str(path)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads(path.read_text())


@pytest.mark.matrix
def test_a_result_names_the_machine_and_the_versions(result: dict[str, Any]) -> None:
    assert {"machine", "versions", "git", "command", "date", "threads"} <= set(result)
    assert (result["benchmark"], result["dtype"]) == ("kernels", "bfloat16")
    assert result["bandwidth_gb_s"] > 0 and result["matmul_tflops"] > 0


@pytest.mark.matrix
def test_every_section_has_times_or_reasons_to_skip(result: dict[str, Any]) -> None:
    timed = Counter(row["section"] for row in result["rows"] if "us" in row)
    assert set(timed) == set(bench_kernels.FORMS)
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
    triton = [row for row in result["rows"] if row["form"].startswith("triton")]
    assert triton and not any("us" in row for row in triton)
