"""LM-Steer in Triton at full size on a card."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
from lm_steer import BACKENDS, backends, padded
from lm_steer_cases import bits, relative_error

from vllm_steer.kernels.lm_steer import (
    Constant,
    Dense,
    LowRank,
    Slot,
    SteeredRows,
    SteerWeights,
    torch_grouped,
)
from vllm_steer.kernels.lm_steer.change_kernels import add_up, constant
from vllm_steer.kernels.lm_steer.dense_kernels import dense
from vllm_steer.kernels.lm_steer.low_rank_kernels import expand, fold, shrink
from vllm_steer.kernels.lm_steer.metadata import BatchMetadata, Tiles
from vllm_steer.kernels.lm_steer.row_kernels import dense_row, expand_row, shrink_row
from vllm_steer.kernels.upload import upload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        triton.knobs.runtime.interpret or not torch.cuda.is_available(),
        reason="needs a CUDA device and compiled kernels",
    ),
]

BFLOAT16 = torch.bfloat16
CUDA = torch.device("cuda")


def normal(*shape: int, dtype: torch.dtype = BFLOAT16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def a_bank(
    width: int,
    ranks: list[int],
    *,
    matrices: int = 0,
    constants: int = 0,
    dtype: torch.dtype = BFLOAT16,
) -> SteerWeights:
    """Low ranks, a third of each fixed; then matrices, then constants, each with a fixed one."""
    slots: list[Slot] = []
    start = 0
    for rank in ranks:
        epsilon = 0.25 / (width * rank) ** 0.5
        slots.append(LowRank(start, start + rank - rank // 3, start + rank, epsilon))
        start += rank
    slots += [Dense(2 * i, 2 * i + 1, 0.25 / width**0.5) for i in range(matrices)]
    slots += [Constant(2 * i, 2 * i + 1, 0.25) for i in range(constants)]
    return SteerWeights(
        slots=tuple(slots),
        shrink=normal(start, width, dtype=dtype, seed=1),
        expand=normal(start, width, dtype=dtype, seed=2),
        dense=normal(2 * matrices, width, width, dtype=dtype, seed=3),
        vectors=normal(2 * constants, width, dtype=dtype, seed=4),
    )


def pairs_of(slots_of_rows: list[list[int]], weights: SteerWeights) -> SteeredRows:
    """Each row's slots, at strengths of either sign."""
    pairs = sorted((slot, row) for row, slots in enumerate(slots_of_rows) for slot in slots)
    slots = np.array([slot for slot, _ in pairs], dtype=np.int64)
    rows = np.array([row for _, row in pairs], dtype=np.int64)
    epsilons = weights.columns.epsilons[slots]
    strengths = ((rows * 7 + slots * 3) % 9 - 4).astype(np.float32)
    distinct_slots, starts, counts = np.unique(slots, return_index=True, return_counts=True)
    groups = zip(distinct_slots.tolist(), starts.tolist(), (starts + counts).tolist(), strict=True)
    return SteeredRows(rows=rows, scales=epsilons * strengths, groups=tuple(groups))


def random_slots(num_rows: int, num_slots: int, most: int, seed: int = 5) -> list[list[int]]:
    """Up to ``most`` different slots per row; every eighth row has none."""
    random = np.random.default_rng(seed)
    return [
        random.permutation(num_slots)[: random.integers(1, most + 1) * (row % 8 != 7)].tolist()
        for row in range(num_rows)
    ]


def written_out(x: torch.Tensor, weights: SteerWeights, pairs: SteeredRows) -> torch.Tensor:
    """The equations of ``operands`` for all rows of a slot at once, in float64."""
    y = x.double()
    for slot, start, end in pairs.groups:
        rows = torch.from_numpy(pairs.rows[start:end]).cuda()
        scale = torch.from_numpy(pairs.scales[start:end]).cuda().double()[:, None]
        hidden, fixed_scale = x[rows].double(), (scale != 0) * weights.slots[slot].epsilon
        match weights.slots[slot]:
            case LowRank(first, fixed, last):
                change = (
                    scale
                    * (hidden @ weights.shrink[first:fixed].double().T)
                    @ weights.expand[first:fixed].double()
                    + fixed_scale
                    * (hidden @ weights.shrink[fixed:last].double().T)
                    @ weights.expand[fixed:last].double()
                )
            case Dense(free, fixed):
                change = scale * (hidden @ weights.dense[free].double().T)
                change += fixed_scale * (hidden @ weights.dense[fixed].double().T)
            case Constant(free, fixed):
                change = scale * weights.vectors[free].double()
                change = change + fixed_scale * weights.vectors[fixed].double()
        y.index_add_(0, rows, change)
    return y


def run(backend: str, x: torch.Tensor, weights: SteerWeights, pairs: SteeredRows) -> torch.Tensor:
    return BACKENDS[backend].steer_rows(x, weights, BACKENDS[backend].prepare(pairs, weights, CUDA))


BANKS = {
    "d4096-r1000-32-steers": lambda dtype: a_bank(4096, [1000] * 32, dtype=dtype),
    "d4096-mixed": lambda dtype: a_bank(
        4096, [8, 1000, 64, 33, 17], matrices=2, constants=2, dtype=dtype
    ),
    "d4096-low": lambda dtype: a_bank(4096, [64] * 6 + [5, 128], dtype=dtype),
    "d1280-dense": lambda dtype: a_bank(1280, [64], matrices=16, dtype=dtype),
    "d1537-odd": lambda dtype: a_bank(1537, [5, 100], matrices=1, constants=1, dtype=dtype),
}


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bank", list(BANKS))
def test_the_error_of_a_full_batch_is_at_most_twice_that_of_torch(
    bank: str, dtype: torch.dtype, backend: str
) -> None:
    weights = BANKS[bank](dtype)
    for num_rows, most in ((1, 1), (64, 1), (64, 4), (256, 1), (1024, 2)):
        if backend == "rowwise" and num_rows > 64:
            continue
        x = normal(num_rows, weights.width, dtype=dtype, seed=6)
        pairs = pairs_of(random_slots(num_rows, len(weights.slots), most), weights)
        expected = written_out(x, weights, pairs)
        result = run(backend, x, weights, pairs)
        plain = torch_grouped.steer_rows(x, weights, torch_grouped.prepare(pairs, weights, CUDA))
        assert relative_error(result, expected) <= 2 * relative_error(plain, expected)
        free = np.setdiff1d(np.arange(num_rows), pairs.rows)
        assert torch.equal(bits(result)[free], bits(x)[free])


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bank", ["d4096-mixed", "d4096-low", "d1280-dense"])
def test_a_row_has_the_same_bits_alone_and_in_a_full_batch(
    bank: str, dtype: torch.dtype, backend: str
) -> None:
    """On tensor cores, and for rows with one steer beside rows with several."""
    weights, num_rows = BANKS[bank](dtype), 256
    slots = random_slots(num_rows, len(weights.slots), 4)
    x = normal(num_rows, weights.width, dtype=dtype, seed=6)
    together = run(backend, x, weights, pairs_of(slots, weights))
    order = np.random.default_rng(8).permutation(num_rows)
    moved = with_rows(pairs_of(slots, weights), np.argsort(order))
    again = run(backend, x[torch.from_numpy(order).cuda()], weights, moved)
    assert torch.equal(bits(again), bits(together)[order])
    for row in [*range(16), 31, 32, 33, 255]:
        alone = run(backend, x[row : row + 1], weights, only_row(pairs_of(slots, weights), row))
        assert torch.equal(bits(alone[0]), bits(together[row]))


def with_rows(pairs: SteeredRows, to: np.ndarray) -> SteeredRows:
    """The pairs of moved rows: row ``b`` is at ``to[b]``; sorted again."""
    rows, scales = to[pairs.rows], pairs.scales.copy()
    for _, start, end in pairs.groups:
        order = np.argsort(rows[start:end], kind="stable")
        rows[start:end], scales[start:end] = rows[start:end][order], scales[start:end][order]
    return SteeredRows(rows=rows, scales=scales, groups=pairs.groups)


def only_row(pairs: SteeredRows, row: int) -> SteeredRows:
    """The pairs of one row, as a batch."""
    pairs_of_row = [
        (slot, pair)
        for slot, start, end in pairs.groups
        for pair in range(start, end)
        if pairs.rows[pair] == row
    ]
    return SteeredRows(
        rows=np.zeros(len(pairs_of_row), dtype=np.int64),
        scales=pairs.scales[[pair for _, pair in pairs_of_row]],
        groups=tuple((slot, place, place + 1) for place, (slot, _) in enumerate(pairs_of_row)),
    )


def tensors_of(metadata: BatchMetadata) -> list[torch.Tensor]:
    """All weights of a batch that has every part."""
    tensors = []
    for part in vars(metadata).values():
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif not isinstance(part, int):
            tensors += vars(part).values()
    return tensors


@backends
def test_a_captured_graph_replays_with_the_steers_in_its_buffers(backend: str) -> None:
    """Tables at their full length, padded, refilled between replays."""
    weights, module, num_rows = BANKS["d4096-mixed"](BFLOAT16), BACKENDS[backend], 32
    x = normal(num_rows, weights.width, seed=6)

    def at_full_length(slots: list[list[int]]) -> BatchMetadata:
        metadata = module.prepare(pairs_of(slots, weights), weights, CUDA)
        return padded(metadata, pairs=128, tiles=128, work=128 * 63, rows=num_rows)

    buffers = at_full_length(random_slots(num_rows, len(weights.slots), 4))
    assert isinstance(buffers.low_rank, Tiles)
    module.steer_rows(x, weights, buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.steer_rows(x, weights, buffers)
    everyone_one = [[row % len(weights.slots)] for row in range(num_rows)]
    batches = [random_slots(num_rows, len(weights.slots), most, seed=most) for most in (1, 2, 4)]
    for seed, slots in enumerate([*batches, everyone_one, [[]] * num_rows], start=20):
        x.copy_(normal(num_rows, weights.width, seed=seed))
        for buffer, new in zip(tensors_of(buffers), tensors_of(at_full_length(slots)), strict=True):
            buffer.copy_(new)
        graph.replay()
        assert torch.equal(bits(out), bits(run(backend, x, weights, pairs_of(slots, weights))))
        assert torch.equal(out, x) == (slots == [[]] * num_rows)


KERNELS = (shrink, fold, expand, dense, constant, add_up, shrink_row, expand_row, dense_row)


def num_compiled() -> int:
    """Kernels that Triton holds for this card."""
    device = torch.cuda.current_device()
    return sum(len(kernel.device_caches[device][0]) for kernel in KERNELS)


@backends
@pytest.mark.parametrize("width", [1552, 1537], ids=["aligned", "odd"])
def test_nothing_compiles_after_warming_up(width: int, backend: str) -> None:
    """Batches of every size, one steer per row or several, of every kind and of one alone."""
    weights = a_bank(width, [5, 100], matrices=2, constants=2)
    before = num_compiled()
    BACKENDS[backend].warm_up(weights, BFLOAT16)
    warm = num_compiled()
    assert warm > before
    frame, padded_rows = normal(257, width), normal(257, -(-width // 64) * 64)  # as vLLM's logits
    for num_rows in (1, 2, 3, 16, 17, 64, 257):
        for most in (1, 4):
            pairs = pairs_of(random_slots(num_rows, len(weights.slots), most), weights)
            run(backend, frame[:num_rows], weights, pairs)
        for slot in range(len(weights.slots)):
            run(backend, frame[:num_rows], weights, pairs_of([[slot]] * num_rows, weights))
            run(
                backend,
                padded_rows[:num_rows, :width],
                weights,
                pairs_of([[slot]] * num_rows, weights),
            )
        run(backend, frame[-num_rows:], weights, pairs_of([[0]] * num_rows, weights))
        run(backend, frame[:num_rows], weights, pairs_of([[]] * num_rows, weights))
    assert num_compiled() == warm


def test_uploaded_arrays_are_unchanged_on_the_card() -> None:
    arrays = [
        np.arange(7, dtype=np.int32),
        np.arange(12, dtype=np.int64).reshape(3, 4).T,
        np.zeros((0, 5), dtype=np.int32),
        np.array([0.5, np.inf], dtype=np.float32),
    ]
    for array, tensor in zip(arrays, upload(arrays, CUDA), strict=True):
        assert (tensor.device.type, tensor.shape) == ("cuda", array.shape)
        assert tensor.data_ptr() % 16 == 0
        assert tensor.tolist() == array.tolist()
    assert upload([], CUDA) == []


@backends
def test_the_host_never_waits_for_the_card(backend: str) -> None:
    weights = a_bank(1280, [8, 1000], matrices=1, constants=1)
    x, module = normal(64, 1280), BACKENDS[backend]
    batches = [pairs_of(random_slots(64, 4, most), weights) for most in (1, 4)]
    module.warm_up(weights, BFLOAT16)
    for pairs in batches:
        run(backend, x, weights, pairs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pairs in batches:
            module.steer_rows(x, weights, module.prepare(pairs, weights, CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def room_for(num_bytes: int) -> None:
    """Skip where the card has less memory left."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes >> 30} GiB of GPU memory, {free >> 30} GiB are free")


BEYOND = 2**31 // 4096 + 16
"""Rows of 4096 numbers that are more than 2^31 numbers."""


@backends
def test_tables_beyond_two_to_the_31_numbers_are_read(backend: str) -> None:
    """The last slot of each kind gives the same result as in its own table."""
    room_for(24 << 30)
    small = a_bank(4096, [24], matrices=1, constants=1)
    num_matrices = 2**31 // 4096**2 + 2

    def behind(table: torch.Tensor, length: int) -> torch.Tensor:
        long = torch.zeros(length, *table.shape[1:], dtype=table.dtype, device="cuda")
        long[-len(table) :] = table
        return long

    epsilons = [slot.epsilon for slot in small.slots]
    large = SteerWeights(
        slots=(
            LowRank(BEYOND - 24, BEYOND - 8, BEYOND, epsilons[0]),
            Dense(num_matrices - 2, num_matrices - 1, epsilons[1]),
            Constant(BEYOND - 2, BEYOND - 1, epsilons[2]),
        ),
        shrink=behind(small.shrink, BEYOND),
        expand=behind(small.expand, BEYOND),
        dense=behind(small.dense, num_matrices),
        vectors=behind(small.vectors, BEYOND),
    )
    x = normal(4, 4096, seed=6)
    for slots in ([[0], [1], [2], []], [[0, 1, 2], [0], [1], [2]]):
        pairs = pairs_of(slots, small)
        result, expected = run(backend, x, large, pairs), run(backend, x, small, pairs)
        assert torch.equal(bits(result), bits(expected))
        assert not torch.equal(expected[0], x[0])


@backends
@pytest.mark.parametrize("slot", [0, 1, 2], ids=["low-rank", "dense", "constant"])
def test_rows_beyond_two_to_the_31_numbers_are_steered(slot: int, backend: str) -> None:
    room_for(16 << 30)
    weights = a_bank(4096, [24], matrices=1, constants=1)
    x = torch.zeros(BEYOND, 4096, dtype=BFLOAT16, device="cuda")
    x[0], x[-1] = normal(2, 4096, seed=6)
    for twice in (False, True):
        slots_of_row = [slot, slot] if twice else [slot]
        ends = pairs_of([slots_of_row, slots_of_row], weights)
        far = SteeredRows(ends.rows * (BEYOND - 1), ends.scales, ends.groups)
        result, expected = run(backend, x, weights, far), run(backend, x[[0, -1]], weights, ends)
        assert torch.equal(bits(result[[0, -1]]), bits(expected))
        assert not result[1:-1].any()
        del result


def test_partial_sums_and_changes_beyond_two_to_the_31_numbers_are_kept_apart() -> None:
    """Enough pairs that the buffers between the kernels are that large; one row represents all."""
    room_for(64 << 30)
    weights = a_bank(4096, [1000], constants=1)
    x = torch.zeros(BEYOND, 4096, dtype=BFLOAT16, device="cuda")
    x[:] = normal(4096, seed=6)
    every, one = np.arange(BEYOND, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for slots in ([0], [0, 1]):
        scales = [0.5 * weights.slots[slot].epsilon for slot in slots]
        many, alone = (
            SteeredRows(
                rows=np.concatenate([rows] * len(slots)),
                scales=np.repeat(np.array(scales, dtype=np.float32), len(rows)),
                groups=tuple((s, s * len(rows), (s + 1) * len(rows)) for s in slots),
            )
            for rows in (every, one)
        )
        result, expected = run("tiled", x, weights, many), run("tiled", x[:1], weights, alone)
        assert not torch.equal(expected[0], x[0])
        assert (result == expected).all()
        del result


SANITIZED = """
import sys
sys.path[:0] = {paths!r}
from test_lm_steer_card import BACKENDS, a_bank, normal, pairs_of, random_slots, run
for width in (37, 320):
    weights = a_bank(width, [1, 5, 33], matrices=1, constants=1)
    for most in (1, 4):
        pairs = pairs_of(random_slots(70, len(weights.slots), most), weights)
        for backend in BACKENDS:
            run(backend, normal(70, width), weights, pairs)
import torch
torch.cuda.synchronize()
print("all ran")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    folder = os.path.dirname(__file__)
    script = SANITIZED.format(paths=[folder, os.path.dirname(folder)])
    ran = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "all ran" in ran.stdout
