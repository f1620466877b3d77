"""Every Triton kernel, compiled for Hopper (sm_90) without a GPU."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import kernel_resources as tool
from vllm_steer.kernels.divergence import triton_fused as divergence
from vllm_steer.kernels.guidance import (
    Conditions,
    Directions,
    Gates,
    Readings,
    TokenMap,
    TokenRules,
    triton_fused,
)
from vllm_steer.kernels.lm_steer import SteeredRows
from vllm_steer.kernels.lm_steer.triton_rowwise import ROWWISE
from vllm_steer.kernels.lm_steer.triton_tiled import TILED, tiled

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

BLOCK_SHARED_BYTES = 227 * 1024  # limit of one block of compute capability 9.0
BLOCK_REGISTERS = 64 * 1024
FORMS = {"TILED": TILED, "ROWWISE": ROWWISE}
PRODUCTS = {"shrink", "expand", "dense"}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["TILED", "ROWWISE"])
@pytest.mark.parametrize(
    ("width", "rank"),
    [
        (4096, 1000),
        pytest.param(1280, 640, marks=pytest.mark.matrix),
        pytest.param(8192, 64, marks=pytest.mark.matrix),
        pytest.param(500, 17, marks=pytest.mark.matrix),
    ],
)
def test_lm_steer_kernels_fit_a_hopper_card_without_spilling(
    form: str, width: int, rank: int, dtype: torch.dtype
) -> None:
    module = FORMS[form]
    with tool.compiling() as compiled:
        module.warm_up(tool.lm_steer_tables(width, rank, dtype), dtype)
    suffix = "" if form == "TILED" else "_row"
    names = {name for name, _ in compiled}
    assert {f"{name}{suffix}" for name in PRODUCTS} | {"constant", "add_up"} <= names
    assert_fit(compiled)
    for (name, _), kernel in compiled.items():
        uses_tensor_cores = name in PRODUCTS and dtype != torch.float32
        assert tool.resources(kernel).tensor_cores == uses_tensor_cores, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("width", "rank"), [(4096, 1000), pytest.param(1280, 640, marks=pytest.mark.matrix)]
)
def test_products_in_16_bits_run_on_hoppers_tensor_cores_with_weights_first(
    width: int, rank: int, dtype: torch.dtype
) -> None:
    """64 rows of weights by a tile's rows, both out of shared memory, loaded 16 bytes at a time."""
    with tool.compiling() as compiled:
        TILED.warm_up(tool.lm_steer_tables(width, rank, dtype), dtype)
    products = [kernel for (name, _), kernel in compiled.items() if name in PRODUCTS]
    assert len(products) == 5
    for kernel in products:
        ptx = kernel.asm["ptx"]
        sizes = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+)k16", ptx))
        assert len(sizes) == 1 and sizes <= {"m64n32", "m64n128"}
        assert re.search(r"wgmma\.mma_async[^{]*\{[^}]*\}, %rd\d+, %rd\d+,", ptx)
        assert "cp.async.cg.shared.global" in ptx and "cp.async.ca" not in ptx
        assert "mma.sync" not in ptx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "varied",
    [
        {"rows": 16},
        {"rows": 64},
        {"columns": 32},
        {"columns": 16},
        {"few_chunks": 4},
        {"few_chunks": 0},
    ],
    ids=str,
)
@pytest.mark.matrix
def test_the_block_sizes_of_a_benchmark_fit_a_hopper_card(
    varied: dict[str, int], dtype: torch.dtype
) -> None:
    for width, rank in ((4096, 1000), (4096, 64)):
        with tool.compiling() as compiled:
            tiled(**varied).warm_up(tool.lm_steer_tables(width, rank // 2, dtype), dtype)
        assert_fit(compiled)


@pytest.mark.parametrize(
    ("rank", "launched"),
    [(64, ["shrink", "expand"]), (1000, ["shrink", "fold", "expand"])],
    ids=["low rank", "high rank"],
)
@pytest.mark.parametrize("rows", [1, 2, 32, 33, 300])
def test_a_batch_of_a_low_rank_takes_two_launches_for_any_number_of_rows(
    rank: int, launched: list[str], rows: int
) -> None:
    tables = tool.lm_steer_tables(4096, rank // 2, torch.bfloat16)
    x, steered = torch.zeros(rows, 4096, dtype=torch.bfloat16), next(batches(rows))
    with tool.compiling() as compiled:
        TILED.steer_rows(x, tables, TILED.prepare(steered, tables, x.device))
    assert [name for name, _ in compiled] == launched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_rotation", [False, True], ids=["add", "rotate"])
@pytest.mark.parametrize("width", [4096, pytest.param(63, marks=pytest.mark.matrix), 8192])
def test_guidance_kernels_fit_a_hopper_card_without_spilling(
    width: int, has_rotation: bool, dtype: torch.dtype
) -> None:
    with tool.compiling() as compiled:
        warm_up_guidance(width, has_rotation, dtype)
    assert len({name for name, _ in compiled}) == 2
    assert_fit(compiled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_rotation", [False, True], ids=["add", "rotate"])
@pytest.mark.parametrize("width", [4096, pytest.param(63, marks=pytest.mark.matrix), 8192])
def test_kernels_of_readings_and_conditions_fit_a_hopper_card_without_spilling(
    width: int, has_rotation: bool, dtype: torch.dtype
) -> None:
    with tool.compiling() as compiled:
        warm_up_readings(width, has_rotation, dtype)
    assert {name for name, _ in compiled} == {"_map", "steer_reading", "read_conditions"}
    assert_fit(compiled)


def test_no_step_with_readings_compiles_a_kernel_after_start_up() -> None:
    width, dtype = 4096, torch.bfloat16
    with tool.compiling() as at_start:
        directions, conditions, gates = warm_up_readings(width, True, dtype)
    layers = len(directions.vectors)
    with tool.compiling() as while_serving:
        for tokens in (1, 2, 16, 17, 257):
            shape = (4, tokens)
            token_map = TokenMap(
                torch.zeros(shape, dtype=torch.int32),
                torch.zeros(layers, *shape),
                low=torch.zeros(shape),
                high=torch.zeros(shape),
                gate=torch.zeros(shape, dtype=torch.int32),
                gates=gates,
            )
            hidden = torch.zeros(tokens, width, dtype=dtype)
            for layer in range(layers):
                for residual in (None, hidden.clone()):
                    for depth in (1, 3, 4):
                        triton_fused.steer_tokens_(
                            hidden, residual, directions, layer, token_map, depth
                        )
                        triton_fused.read_conditions_(
                            hidden, residual, conditions, layer, token_map, depth
                        )
    assert while_serving and set(while_serving) <= set(at_start)


def warm_up_readings(
    width: int, has_rotation: bool, dtype: torch.dtype
) -> tuple[Directions, Conditions, Gates]:
    """What sites of three layers with readings, gates and conditions were warmed up with."""
    readings = Readings(
        torch.zeros(5, dtype=torch.int32),
        torch.zeros(5, 4),
        torch.zeros(3, 2, width),
        torch.zeros(3, 2),
        torch.zeros(3, 2),
    )
    rotations = torch.ones(5) if has_rotation else None
    directions = Directions(torch.zeros(3, 5, width), rotations, readings)
    gates = Gates(torch.zeros(9, 4), torch.zeros(9))
    number = torch.zeros(2)
    conditions = Conditions(torch.zeros(3, 2, width), number.to(torch.int32), number, number)
    triton_fused.warm_up(
        directions, hidden_dtype=dtype, residual_dtype=dtype, num_doses=4, gates=gates
    )
    triton_fused.warm_up_conditions(conditions, dtype, num_tests=16, gates=gates)
    return directions, conditions, gates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [128256, 50257])
def test_divergence_kernels_fit_a_hopper_card_without_spilling(
    vocab_size: int, dtype: torch.dtype
) -> None:
    with tool.compiling() as compiled:
        divergence_of(1, vocab_size, dtype)
    assert {name for name, _ in compiled} == {"likeliest", "divergence"}
    assert_fit(compiled)


def test_no_number_of_doses_compiles_a_kernel_after_the_first() -> None:
    with tool.compiling() as at_start:
        divergence_of(64, 128256, torch.bfloat16)
    with tool.compiling() as while_serving:
        for doses in (1, 2, 3, 16, 17, 63):
            divergence_of(doses, 128256, torch.bfloat16)
    assert while_serving and set(while_serving) <= set(at_start)


def divergence_of(doses: int, vocab_size: int, dtype: torch.dtype) -> None:
    """The call of a step: logits, rows and p of some doses, each in its own memory."""
    logits = torch.zeros(2 * doses, vocab_size, dtype=dtype)
    rows = torch.arange(doses)
    divergence.divergence(logits, rows, rows + doses, torch.full((doses,), 0.5))


def assert_fit(compiled: dict[tuple[str, str], Any]) -> None:
    """No kernel spills, and at least one block of each fits a multiprocessor."""
    for (name, _), kernel in compiled.items():
        used = tool.resources(kernel)
        assert used.spilled_bytes == 0, name
        assert used.shared_bytes <= BLOCK_SHARED_BYTES, name
        assert used.registers * 32 * kernel.metadata.num_warps <= BLOCK_REGISTERS, name


def warm_up_guidance(width: int, has_rotation: bool, dtype: torch.dtype) -> Directions:
    """The tables of three layers that a site was warmed up with."""
    directions = Directions(torch.zeros(3, 5, width), torch.ones(5) if has_rotation else None)
    triton_fused.warm_up(directions, hidden_dtype=dtype, residual_dtype=dtype, num_doses=4)
    return directions


@pytest.mark.parametrize("form", ["TILED", "ROWWISE"])
def test_no_batch_of_lm_steers_compiles_a_kernel_after_start_up(form: str) -> None:
    module, dtype = FORMS[form], torch.bfloat16
    tables = tool.lm_steer_tables(4096, 64, dtype)
    with tool.compiling() as at_start:
        module.warm_up(tables, dtype)
    with tool.compiling() as while_serving:
        for rows in (1, 2, 3, 16, 64, 65, 257):
            x = torch.zeros(rows + 3, 4096, dtype=dtype)[3:]
            for steered in batches(rows):
                module.steer_rows(x, tables, module.prepare(steered, tables, x.device))
    assert while_serving
    assert set(while_serving) <= set(at_start)


def batches(rows: int) -> Iterator[SteeredRows]:
    """Each kind by itself on all rows and on the first, and all three on every row."""
    for slot in range(3):
        for steered in {1, rows}:
            yield SteeredRows(
                np.arange(steered), np.ones(steered, dtype=np.float32), ((slot, 0, steered),)
            )
    yield SteeredRows(
        np.tile(np.arange(rows), 3),
        np.ones(3 * rows, dtype=np.float32),
        tuple((slot, slot * rows, (slot + 1) * rows) for slot in range(3)),
    )


@pytest.mark.parametrize("has_rotation", [False, True], ids=["add", "rotate"])
def test_no_batch_of_guided_tokens_compiles_a_kernel_after_start_up(has_rotation: bool) -> None:
    dtype, width, max_tokens = torch.bfloat16, 4096, 512
    with tool.compiling() as at_start:
        directions = warm_up_guidance(width, has_rotation, dtype)
    token_map = TokenMap(
        torch.zeros(4, max_tokens, dtype=torch.int32), torch.zeros(3, 4, max_tokens)
    )
    with tool.compiling() as while_serving:
        for tokens in (1, 2, 7, 16, 64, 257):
            hidden, residual = torch.zeros(2, tokens, width, dtype=dtype)
            for layer, depth in ((0, 1), (1, 2), (2, 4)):
                residual_arg = residual if has_rotation else None
                triton_fused.steer_tokens_(
                    hidden, residual_arg, directions, layer, token_map, depth
                )
                triton_fused.steer_tokens_(hidden, None, directions, layer, token_map, depth)
        for requests, depth, tokens in ((1, 1, 1), (2, 4, 9), (16, 2, 64), (33, 3, 512)):
            map_a_batch(requests, depth, tokens, token_map)
    assert len({name for name, _ in while_serving}) == 2
    assert set(while_serving) <= set(at_start)


def map_a_batch(requests: int, depth: int, tokens: int, whole_map: TokenMap) -> None:
    """Map tokens as a site does: into the front of its buffers, from rules in one piece."""
    *integers, table = torch.zeros(4, depth, requests, dtype=torch.int64)
    spans = torch.zeros(2, 1, depth, requests, dtype=torch.int64)
    floats, layers = torch.zeros(2, depth, requests), torch.zeros(3, depth, requests)
    pool = torch.zeros(tokens)
    rules = TokenRules(
        *integers, *spans, *floats, layers=layers, pool_offset=table, strength_pool=pool
    )
    starts = torch.zeros(requests + 2, dtype=torch.int32)[: requests + 1]
    positions = torch.zeros(600, dtype=torch.int64)[:tokens]
    front = TokenMap(whole_map.directions[:depth], whole_map.strengths[:, :depth])
    bounds = torch.zeros(requests + 2, dtype=torch.int64)[1:-1]
    of_text = replace(rules, text_only=table, placeholder_bounds=bounds)
    for with_or_without_text in (rules, of_text):
        triton_fused.map_tokens(with_or_without_text, starts, positions, front)
