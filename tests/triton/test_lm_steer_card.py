"""LM-Steer in Triton at full size on a card."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
from lm_steer import FORMS, forms, padded
from lm_steer_cases import bits, relative_error

from vllm_steer.kernels.lm_steer import (
    Constant,
    Dense,
    LowRank,
    Slot,
    SteeredRows,
    SteerTables,
    grouped,
)
from vllm_steer.kernels.lm_steer.change_kernels import add_up, constant
from vllm_steer.kernels.lm_steer.dense_kernels import dense
from vllm_steer.kernels.lm_steer.low_rank_kernels import expand, fold, shrink
from vllm_steer.kernels.lm_steer.placing import PlacedRows, Tiles
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
) -> SteerTables:
    """Low ranks, a third of each fixed; then matrices, then constants, each with a fixed one."""
    slots: list[Slot] = []
    start = 0
    for rank in ranks:
        epsilon = 0.25 / (width * rank) ** 0.5
        slots.append(LowRank(start, start + rank - rank // 3, start + rank, epsilon))
        start += rank
    slots += [Dense(2 * i, 2 * i + 1, 0.25 / width**0.5) for i in range(matrices)]
    slots += [Constant(2 * i, 2 * i + 1, 0.25) for i in range(constants)]
    return SteerTables(
        slots=tuple(slots),
        shrink=normal(start, width, dtype=dtype, seed=1),
        expand=normal(start, width, dtype=dtype, seed=2),
        dense=normal(2 * matrices, width, width, dtype=dtype, seed=3),
        vectors=normal(2 * constants, width, dtype=dtype, seed=4),
    )


def pairs_of(slots_of_rows: list[list[int]], tables: SteerTables) -> SteeredRows:
    """Each row's slots, at strengths of either sign."""
    pairs = sorted((slot, row) for row, slots in enumerate(slots_of_rows) for slot in slots)
    slots = np.array([slot for slot, _ in pairs], dtype=np.int64)
    rows = np.array([row for _, row in pairs], dtype=np.int64)
    epsilons = tables.columns.epsilons[slots]
    strengths = ((rows * 7 + slots * 3) % 9 - 4).astype(np.float32)
    found, starts, counts = np.unique(slots, return_index=True, return_counts=True)
    groups = zip(found.tolist(), starts.tolist(), (starts + counts).tolist(), strict=True)
    return SteeredRows(rows=rows, scales=epsilons * strengths, groups=tuple(groups))


def random_slots(num_rows: int, num_slots: int, most: int, seed: int = 5) -> list[list[int]]:
    """Up to ``most`` different slots per row; every eighth row has none."""
    random = np.random.default_rng(seed)
    return [
        random.permutation(num_slots)[: random.integers(1, most + 1) * (row % 8 != 7)].tolist()
        for row in range(num_rows)
    ]


def written_out(x: torch.Tensor, tables: SteerTables, pairs: SteeredRows) -> torch.Tensor:
    """The equations of ``operands`` for all rows of a slot at once, in float64."""
    y = x.double()
    for slot, start, end in pairs.groups:
        rows = torch.from_numpy(pairs.rows[start:end]).cuda()
        scale = torch.from_numpy(pairs.scales[start:end]).cuda().double()[:, None]
        hidden, fixed_scale = x[rows].double(), (scale != 0) * tables.slots[slot].epsilon
        match tables.slots[slot]:
            case LowRank(first, fixed, last):
                change = (
                    scale
                    * (hidden @ tables.shrink[first:fixed].double().T)
                    @ tables.expand[first:fixed].double()
                    + fixed_scale
                    * (hidden @ tables.shrink[fixed:last].double().T)
                    @ tables.expand[fixed:last].double()
                )
            case Dense(free, fixed):
                change = scale * (hidden @ tables.dense[free].double().T)
                change += fixed_scale * (hidden @ tables.dense[fixed].double().T)
            case Constant(free, fixed):
                change = scale * tables.vectors[free].double()
                change = change + fixed_scale * tables.vectors[fixed].double()
        y.index_add_(0, rows, change)
    return y


def run(form: str, x: torch.Tensor, tables: SteerTables, pairs: SteeredRows) -> torch.Tensor:
    return FORMS[form].steer_rows(x, tables, FORMS[form].place(pairs, tables, CUDA))


BANKS = {
    "d4096-r1000-32-steers": lambda dtype: a_bank(4096, [1000] * 32, dtype=dtype),
    "d4096-mixed": lambda dtype: a_bank(
        4096, [8, 1000, 64, 33, 17], matrices=2, constants=2, dtype=dtype
    ),
    "d4096-low": lambda dtype: a_bank(4096, [64] * 6 + [5, 128], dtype=dtype),
    "d1280-dense": lambda dtype: a_bank(1280, [64], matrices=16, dtype=dtype),
    "d1537-odd": lambda dtype: a_bank(1537, [5, 100], matrices=1, constants=1, dtype=dtype),
}


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bank", list(BANKS))
def test_a_full_batch_errs_at_most_twice_as_much_as_plain_torch(
    bank: str, dtype: torch.dtype, form: str
) -> None:
    tables = BANKS[bank](dtype)
    for num_rows, most in ((1, 1), (64, 1), (64, 4), (256, 1), (1024, 2)):
        if form == "by_row" and num_rows > 64:
            continue
        x = normal(num_rows, tables.width, dtype=dtype, seed=6)
        pairs = pairs_of(random_slots(num_rows, len(tables.slots), most), tables)
        wanted = written_out(x, tables, pairs)
        found = run(form, x, tables, pairs)
        plain = grouped.steer_rows(x, tables, grouped.place(pairs, tables, CUDA))
        assert relative_error(found, wanted) <= 2 * relative_error(plain, wanted)
        free = np.setdiff1d(np.arange(num_rows), pairs.rows)
        assert torch.equal(bits(found)[free], bits(x)[free])


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bank", ["d4096-mixed", "d4096-low", "d1280-dense"])
def test_a_row_has_the_same_bits_alone_and_in_a_full_batch(
    bank: str, dtype: torch.dtype, form: str
) -> None:
    """On tensor cores, and for rows with one steer beside rows with several."""
    tables, num_rows = BANKS[bank](dtype), 256
    slots = random_slots(num_rows, len(tables.slots), 4)
    x = normal(num_rows, tables.width, dtype=dtype, seed=6)
    together = run(form, x, tables, pairs_of(slots, tables))
    order = np.random.default_rng(8).permutation(num_rows)
    moved = with_rows(pairs_of(slots, tables), np.argsort(order))
    again = run(form, x[torch.from_numpy(order).cuda()], tables, moved)
    assert torch.equal(bits(again), bits(together)[order])
    for row in [*range(16), 31, 32, 33, 255]:
        alone = run(form, x[row : row + 1], tables, only_row(pairs_of(slots, tables), row))
        assert torch.equal(bits(alone[0]), bits(together[row]))


def with_rows(pairs: SteeredRows, to: np.ndarray) -> SteeredRows:
    """The pairs of rows that stand elsewhere now: row ``b`` at ``to[b]``, sorted again."""
    rows, scales = to[pairs.rows], pairs.scales.copy()
    for _, start, end in pairs.groups:
        order = np.argsort(rows[start:end], kind="stable")
        rows[start:end], scales[start:end] = rows[start:end][order], scales[start:end][order]
    return SteeredRows(rows=rows, scales=scales, groups=pairs.groups)


def only_row(pairs: SteeredRows, row: int) -> SteeredRows:
    """The pairs of one row, in a batch of its own."""
    kept = [
        (slot, pair)
        for slot, start, end in pairs.groups
        for pair in range(start, end)
        if pairs.rows[pair] == row
    ]
    return SteeredRows(
        rows=np.zeros(len(kept), dtype=np.int64),
        scales=pairs.scales[[pair for _, pair in kept]],
        groups=tuple((slot, place, place + 1) for place, (slot, _) in enumerate(kept)),
    )


def tensors_of(placed: PlacedRows) -> list[torch.Tensor]:
    """All tables of a batch that has every part."""
    found = []
    for part in vars(placed).values():
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif not isinstance(part, int):
            found += vars(part).values()
    return found


@forms
def test_a_captured_graph_replays_with_whatever_steers_its_buffers_hold(form: str) -> None:
    """Tables at their full length, padded, refilled between replays."""
    tables, module, num_rows = BANKS["d4096-mixed"](BFLOAT16), FORMS[form], 32
    x = normal(num_rows, tables.width, seed=6)

    def at_full_length(slots: list[list[int]]) -> PlacedRows:
        placed = module.place(pairs_of(slots, tables), tables, CUDA)
        return padded(placed, pairs=128, tiles=128, work=128 * 63, rows=num_rows)

    buffers = at_full_length(random_slots(num_rows, len(tables.slots), 4))
    assert isinstance(buffers.low_rank, Tiles)
    module.steer_rows(x, tables, buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.steer_rows(x, tables, buffers)
    everyone_one = [[row % len(tables.slots)] for row in range(num_rows)]
    batches = [random_slots(num_rows, len(tables.slots), most, seed=most) for most in (1, 2, 4)]
    for seed, slots in enumerate([*batches, everyone_one, [[]] * num_rows], start=20):
        x.copy_(normal(num_rows, tables.width, seed=seed))
        for buffer, new in zip(tensors_of(buffers), tensors_of(at_full_length(slots)), strict=True):
            buffer.copy_(new)
        graph.replay()
        assert torch.equal(bits(out), bits(run(form, x, tables, pairs_of(slots, tables))))
        assert torch.equal(out, x) == (slots == [[]] * num_rows)


KERNELS = (shrink, fold, expand, dense, constant, add_up, shrink_row, expand_row, dense_row)


def num_compiled() -> int:
    """Kernels that Triton holds for this card."""
    device = torch.cuda.current_device()
    return sum(len(kernel.device_caches[device][0]) for kernel in KERNELS)


@forms
@pytest.mark.parametrize("width", [1552, 1537], ids=["aligned", "odd"])
def test_nothing_compiles_after_warming_up(width: int, form: str) -> None:
    """Batches of every size, one steer per row or several, of every kind and of one alone."""
    tables = a_bank(width, [5, 100], matrices=2, constants=2)
    before = num_compiled()
    FORMS[form].warm_up(tables, BFLOAT16)
    warm = num_compiled()
    assert warm > before
    frame, padded_rows = normal(257, width), normal(257, -(-width // 64) * 64)  # as vLLM's logits
    for num_rows in (1, 2, 3, 16, 17, 64, 257):
        for most in (1, 4):
            pairs = pairs_of(random_slots(num_rows, len(tables.slots), most), tables)
            run(form, frame[:num_rows], tables, pairs)
        for slot in range(len(tables.slots)):
            run(form, frame[:num_rows], tables, pairs_of([[slot]] * num_rows, tables))
            run(form, padded_rows[:num_rows, :width], tables, pairs_of([[slot]] * num_rows, tables))
        run(form, frame[-num_rows:], tables, pairs_of([[0]] * num_rows, tables))
        run(form, frame[:num_rows], tables, pairs_of([[]] * num_rows, tables))
    assert num_compiled() == warm


def test_arrays_arrive_on_the_card_as_they_were() -> None:
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


@forms
def test_the_host_never_waits_for_the_card(form: str) -> None:
    tables = a_bank(1280, [8, 1000], matrices=1, constants=1)
    x, module = normal(64, 1280), FORMS[form]
    batches = [pairs_of(random_slots(64, 4, most), tables) for most in (1, 4)]
    module.warm_up(tables, BFLOAT16)
    for pairs in batches:
        run(form, x, tables, pairs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pairs in batches:
            module.steer_rows(x, tables, module.place(pairs, tables, CUDA))
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


@forms
def test_tables_beyond_two_to_the_31_numbers_are_read(form: str) -> None:
    """The last slot of each kind gives what it gives in a table of its own."""
    room_for(24 << 30)
    small = a_bank(4096, [24], matrices=1, constants=1)
    num_matrices = 2**31 // 4096**2 + 2

    def behind(table: torch.Tensor, length: int) -> torch.Tensor:
        long = torch.zeros(length, *table.shape[1:], dtype=table.dtype, device="cuda")
        long[-len(table) :] = table
        return long

    epsilons = [slot.epsilon for slot in small.slots]
    large = SteerTables(
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
        found, wanted = run(form, x, large, pairs), run(form, x, small, pairs)
        assert torch.equal(bits(found), bits(wanted))
        assert not torch.equal(wanted[0], x[0])


@forms
@pytest.mark.parametrize("slot", [0, 1, 2], ids=["low-rank", "dense", "constant"])
def test_rows_beyond_two_to_the_31_numbers_are_steered(slot: int, form: str) -> None:
    room_for(16 << 30)
    tables = a_bank(4096, [24], matrices=1, constants=1)
    x = torch.zeros(BEYOND, 4096, dtype=BFLOAT16, device="cuda")
    x[0], x[-1] = normal(2, 4096, seed=6)
    for twice in (False, True):
        taken = [slot, slot] if twice else [slot]
        ends = pairs_of([taken, taken], tables)
        far = SteeredRows(ends.rows * (BEYOND - 1), ends.scales, ends.groups)
        found, wanted = run(form, x, tables, far), run(form, x[[0, -1]], tables, ends)
        assert torch.equal(bits(found[[0, -1]]), bits(wanted))
        assert not found[1:-1].any()
        del found


def test_partial_sums_and_changes_beyond_two_to_the_31_numbers_are_kept_apart() -> None:
    """So many pairs that what is kept between the kernels is that large; one row stands for all."""
    room_for(64 << 30)
    tables = a_bank(4096, [1000], constants=1)
    x = torch.zeros(BEYOND, 4096, dtype=BFLOAT16, device="cuda")
    x[:] = normal(4096, seed=6)
    every, one = np.arange(BEYOND, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for slots in ([0], [0, 1]):
        scales = [0.5 * tables.slots[slot].epsilon for slot in slots]
        many, alone = (
            SteeredRows(
                rows=np.concatenate([rows] * len(slots)),
                scales=np.repeat(np.array(scales, dtype=np.float32), len(rows)),
                groups=tuple((s, s * len(rows), (s + 1) * len(rows)) for s in slots),
            )
            for rows in (every, one)
        )
        found, wanted = run("by_tile", x, tables, many), run("by_tile", x[:1], tables, alone)
        assert not torch.equal(wanted[0], x[0])
        assert (found == wanted).all()
        del found


SANITIZED = """
import sys
sys.path[:0] = {paths!r}
from test_lm_steer_card import FORMS, a_bank, normal, pairs_of, random_slots, run
for width in (37, 320):
    tables = a_bank(width, [1, 5, 33], matrices=1, constants=1)
    for most in (1, 4):
        pairs = pairs_of(random_slots(70, len(tables.slots), most), tables)
        for form in FORMS:
            run(form, normal(70, width), tables, pairs)
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
    here = os.path.dirname(__file__)
    script = SANITIZED.format(paths=[here, os.path.dirname(here)])
    ran = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "all ran" in ran.stdout
