"""Host-side preparation of LM-Steer's kernels: tiles, sums, block sizes, copies, the backend."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer.kernels import dispatch
from vllm_steer.kernels.dispatch import FEW_ROWS, KernelError, lm_steer_backend, resolve_kernels
from vllm_steer.kernels.lm_steer import (
    Constant,
    Dense,
    LowRank,
    Slot,
    SteeredRows,
    SteerWeights,
    torch_grouped,
    warm_up,
)
from vllm_steer.kernels.lm_steer.block_sizes import (
    FEW_CHUNKS,
    IN_FLIGHT,
    PROCESSORS,
    BlockSizes,
    row_sizes,
    tile_sizes,
)
from vllm_steer.kernels.lm_steer.metadata import BatchMetadata, batch_metadata
from vllm_steer.kernels.upload import upload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

SLOTS: tuple[Slot, ...] = (
    LowRank(0, 1, 1, 0.5),
    Constant(0, None, 0.25),
    LowRank(1, 6, 11, 2.0),
    Dense(0, None, 1.0),
    LowRank(11, 50, 50, 1.5),
    Dense(1, 2, 0.125),
    Constant(1, 2, 3.0),
)


def weights_with(slots: tuple[Slot, ...], width: int = 4) -> SteerWeights:
    ranks = max((slot.end for slot in slots if isinstance(slot, LowRank)), default=0)
    return SteerWeights(
        slots=slots,
        shrink=torch.zeros(ranks, width),
        expand=torch.zeros(ranks, width),
        dense=torch.zeros(3, width, width),
        vectors=torch.zeros(3, width),
    )


def pairs_of(uses: list[tuple[int, int]]) -> SteeredRows:
    """``(slot, row)`` of each pair, sorted; the scale of a pair is its index."""
    slots = [slot for slot, _ in uses]
    groups = [(s, slots.index(s), slots.index(s) + slots.count(s)) for s in dict.fromkeys(slots)]
    return SteeredRows(
        rows=np.array([row for _, row in uses], dtype=np.int64),
        scales=np.arange(len(uses), dtype=np.float32),
        groups=tuple(groups),
    )


def placed_of(uses: list[tuple[int, int]], rows_per_tile: int, ranks: int) -> BatchMetadata:
    return batch_metadata(
        pairs_of(uses),
        weights_with(SLOTS),
        CPU,
        rows_per_tile=rows_per_tile,
        ranks_per_program=ranks,
    )


def tiles_by_a_loop(
    uses: list[tuple[int, int]], kind: type[Slot], size: int
) -> list[tuple[list[int], float]]:
    """Bounds and epsilon of each tile, which ends when it is full or the slot changes."""
    tiles: list[tuple[list[int], float]] = []
    open_slot = None
    for pair, (slot, _) in enumerate(uses):
        kinds = SLOTS[slot]
        if not isinstance(kinds, kind):
            continue
        if slot == open_slot and tiles[-1][0][1] - tiles[-1][0][0] < size:
            tiles[-1][0][1] = pair + 1
            continue
        open_slot = slot
        if isinstance(kinds, LowRank):
            numbers = [kinds.start, kinds.fixed, kinds.end]
        else:
            numbers = [kinds.free, -1 if kinds.fixed is None else kinds.fixed, 0]
        tiles.append(([pair, pair + 1, *numbers], kinds.epsilon))
    return tiles


uses_of_slots = st.lists(
    st.tuples(st.integers(0, len(SLOTS) - 1), st.integers(0, 30)), max_size=60
).map(sorted)


@given(uses=uses_of_slots, size=st.integers(1, 5), ranks=st.sampled_from([16, 32]))
def test_the_metadata_equals_a_loop_over_the_pairs(
    uses: list[tuple[int, int]], size: int, ranks: int
) -> None:
    metadata = placed_of(uses, size, ranks)
    assert metadata.rows.tolist() == [row for _, row in uses]
    assert metadata.scales.tolist() == list(range(len(uses)))
    assert metadata.touched == len({row for _, row in uses})
    for tiles, kind, most in (
        (metadata.low_rank, LowRank, size),
        (metadata.dense, Dense, size),
        (metadata.constant, Constant, 1),
    ):
        expected = tiles_by_a_loop(uses, kind, most)
        assert (tiles is None) == (not expected)
        if tiles is not None:
            assert tiles.bounds.tolist() == [bounds for bounds, _ in expected]
            assert tiles.epsilons.tolist() == [epsilon for _, epsilon in expected]


@given(uses=uses_of_slots, size=st.integers(1, 5), ranks=st.sampled_from([16, 32]))
def test_exactly_one_program_shrinks_each_rank_of_each_low_rank_tile(
    uses: list[tuple[int, int]], size: int, ranks: int
) -> None:
    metadata = placed_of(uses, size, ranks)
    if metadata.low_rank is None:
        assert metadata.work is None
        return
    assert metadata.work is not None
    bounds = metadata.low_rank.bounds.tolist()
    expected = [
        (tile, first)
        for tile, (_, _, start, _, end) in enumerate(bounds)
        for first in range(0, end - start, ranks)
    ]
    tiles = [tuple(item) for item in metadata.work.tolist()]
    assert sorted(tiles) == expected
    weights = [(bounds[tile][2], first) for tile, first in tiles]
    assert weights == sorted(weights), "programs that read the same weights are not side by side"


@given(uses=uses_of_slots)
def test_sums_have_every_pair_of_a_row_in_ascending_order_of_slot(
    uses: list[tuple[int, int]],
) -> None:
    sums = placed_of(uses, 4, 16).sums
    rows = [row for _, row in uses]
    assert (sums is None) == (len(set(rows)) == len(rows))
    if sums is None:
        return
    touched, starts, order = sums.rows.tolist(), sums.starts.tolist(), sums.order.tolist()
    assert touched == sorted(set(rows))
    assert (starts[0], starts[-1]) == (0, len(uses))
    for index, row in enumerate(touched):
        of_the_row = [pair for pair in range(len(uses)) if rows[pair] == row]
        assert order[starts[index] : starts[index + 1]] == of_the_row
    assert all(table.dtype == torch.int32 for table in (sums.rows, sums.starts, sums.order))


def test_the_metadata_of_a_batch_without_steers_launches_nothing() -> None:
    metadata = placed_of([], 4, 16)
    parts = (metadata.low_rank, metadata.work, metadata.dense, metadata.constant, metadata.sums)
    assert parts == (None, None, None, None, None)
    assert metadata.touched == 0


def test_the_columns_of_the_tables_have_kind_index_and_epsilon_of_each_slot() -> None:
    columns = weights_with(SLOTS).columns
    assert columns.kinds.tolist() == [0, 2, 0, 1, 0, 1, 2]
    assert columns.bounds.tolist() == [
        [0, 1, 1],
        [0, -1, 0],
        [1, 6, 11],
        [0, -1, 0],
        [11, 50, 50],
        [1, 2, 0],
        [1, 2, 0],
    ]
    assert columns.epsilons.tolist() == [0.5, 0.25, 2.0, 1.0, 1.5, 0.125, 3.0]
    assert (columns.epsilons.dtype, columns.max_rank, columns.rank_stride) == (np.float32, 39, 64)


def test_tables_without_low_ranks_have_columns_too() -> None:
    columns = weights_with((Constant(0, None, 1.0),)).columns
    assert (columns.max_rank, columns.rank_stride) == (0, 0)
    assert weights_with(()).columns.bounds.shape == (0, 3)


WIDTHS = st.integers(1, 16384)
RANKS = st.integers(0, 2000)


def all_sizes(width: int, rank: int) -> list[BlockSizes]:
    return [tile_sizes(width, rank, 4), tile_sizes(width, rank, 2), row_sizes(width, rank)]


@given(width=WIDTHS, rank=RANKS)
def test_blocks_are_powers_of_two_that_tensor_cores_accept(width: int, rank: int) -> None:
    for sizes in all_sizes(width, rank):
        blocks = [
            sizes.shrink_ranks,
            sizes.shrink_width,
            sizes.expand_ranks,
            sizes.expand_width,
            sizes.dense_out,
            sizes.dense_in,
        ]
        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
        assert sizes.rows & (sizes.rows - 1) == 0
        assert min(sizes.shrink_stages, sizes.expand_stages, sizes.dense_stages) >= 1


@given(width=WIDTHS, rank=RANKS)
def test_chunks_are_whole_blocks_that_cover_the_width_and_none_is_empty(
    width: int, rank: int
) -> None:
    for sizes in all_sizes(width, rank):
        assert sizes.chunk % sizes.shrink_width == 0
        assert sizes.chunk * (sizes.chunks - 1) < width <= sizes.chunk * sizes.chunks


@given(width=WIDTHS, rank=st.integers(1, 2000))
def test_the_buffer_between_the_factors_holds_every_block_of_ranks(width: int, rank: int) -> None:
    """Kernels over tiles write whole blocks of ranks, the last one too."""
    rank_stride = weights_with((LowRank(0, rank, rank, 1.0),), width=1).columns.rank_stride
    for sizes in all_sizes(width, rank):
        assert -(-rank // sizes.shrink_ranks) * sizes.shrink_ranks <= rank_stride


def programs_of_one_tile(sizes: BlockSizes, width: int, rank: int) -> dict[str, int]:
    """Of each product."""
    return {
        "shrink": sizes.chunks * -(-rank // sizes.shrink_ranks),
        "expand": -(-width // sizes.expand_width),
        "dense": -(-width // sizes.dense_out),
    }


@pytest.mark.parametrize("width", [2048, 4096, 5120, 8192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_one_tile_at_rank_1000_has_about_one_shrink_program_per_multiprocessor(
    width: int, itemsize: int
) -> None:
    programs = programs_of_one_tile(tile_sizes(width, 1000, itemsize), width, 1000)
    assert PROCESSORS <= programs["shrink"] < 2 * PROCESSORS


@pytest.mark.parametrize("width", [4096, 5120, 8192])
def test_one_tile_has_enough_weights_in_flight_for_the_fastest_memory(width: int) -> None:
    """For every product in 16 bits: the bytes that 4.3 TB/s at 0.8 us need; two programs per
    processor.
    """
    sizes = tile_sizes(width, 1000, 2)
    programs = programs_of_one_tile(sizes, width, 1000)
    for name, stages, parts in (
        ("shrink", sizes.shrink_stages, 1),
        ("expand", sizes.expand_stages, sizes.expand_parts),
        ("dense", sizes.dense_stages, sizes.dense_parts),
    ):
        weights = 64 * 64 * 2
        assert programs[name] * (stages - 1) * weights >= IN_FLIGHT, name
        shared = stages * (weights + parts * sizes.rows * 64 * 2)
        assert 2 * (shared + 1024) <= 227 * 1024, name


@pytest.mark.parametrize("width", [4096, 8192])
def test_one_row_has_enough_weights_in_flight_for_the_fastest_memory(width: int) -> None:
    """The bytes that each program loads at once, since nothing is pipelined."""
    sizes = row_sizes(width, 1000)
    programs = programs_of_one_tile(sizes, width, 1000)
    assert programs["shrink"] * sizes.shrink_ranks * sizes.shrink_width * 2 >= IN_FLIGHT
    assert programs["expand"] * sizes.expand_ranks * sizes.expand_width * 2 >= IN_FLIGHT


@pytest.mark.parametrize("width", [4096, 8192])
def test_every_product_of_one_tile_in_32_bits_has_a_program_per_multiprocessor(width: int) -> None:
    sizes = tile_sizes(width, 1000, 4)
    assert min(programs_of_one_tile(sizes, width, 1000).values()) >= PROCESSORS


@pytest.mark.parametrize("width", [4096, 8192])
def test_narrower_blocks_give_a_program_per_multiprocessor_on_request(
    width: int,
) -> None:
    sizes = tile_sizes(width, 1000, 2, columns=16)
    assert min(programs_of_one_tile(sizes, width, 1000).values()) >= PROCESSORS


@given(
    width=WIDTHS.map(lambda width: 16 * width),
    rank=st.integers(1, 2000),
    rows=st.sampled_from([16, 32, 64]),
    columns=st.sampled_from([16, 32, 64]),
    min_rows=st.integers(0, 8),
)
def test_every_product_in_16_bits_takes_64_weights_as_tensor_cores_do(
    width: int, rank: int, rows: int, columns: int, min_rows: int
) -> None:
    sizes = tile_sizes(width, rank, 2, rows=rows, columns=columns, few_chunks=min_rows)
    assert sizes.shrink_ranks == 64
    assert sizes.expand_width * sizes.expand_parts == 64
    assert sizes.dense_out * sizes.dense_parts == 64
    assert sizes.rows == rows and sizes.dense_out <= columns


@pytest.mark.parametrize("width", [512, 4096, 8192])
@pytest.mark.parametrize(("rank", "folds"), [(8, True), (64, True), (128, True), (1000, False)])
def test_expand_reduces_the_partial_sums_of_low_ranks_itself(
    width: int, rank: int, folds: bool
) -> None:
    """One launch less per batch; rank 1000 has too many partial sums to read again."""
    sizes = tile_sizes(width, rank, 2)
    assert sizes.expand_folds == folds
    assert not folds or sizes.chunks <= FEW_CHUNKS
    assert not tile_sizes(width, rank, 2, few_chunks=0).expand_folds


def test_arrays_of_any_dtype_and_shape_become_tensors() -> None:
    arrays = [
        np.arange(7, dtype=np.int32),
        np.arange(12, dtype=np.int64).reshape(3, 4).T,
        np.zeros((0, 5), dtype=np.int32),
        np.array([0.5, np.inf], dtype=np.float32),
    ]
    for array, tensor in zip(arrays, upload(arrays, CPU), strict=True):
        assert tensor.shape == array.shape
        assert tensor.dtype == torch.from_numpy(array.copy()).dtype
        assert tensor.is_contiguous()
        assert tensor.tolist() == array.tolist()


def test_writing_to_an_uploaded_tensor_does_not_change_the_array() -> None:
    array = np.arange(5, dtype=np.float32)
    (tensor,) = upload([array], CPU)
    tensor.fill_(9)
    assert array.tolist() == [0, 1, 2, 3, 4]


def test_kernels_are_chosen_by_name_and_device() -> None:
    assert resolve_kernels("auto", CPU) == "torch"
    assert resolve_kernels("auto", CUDA) == "triton"
    assert resolve_kernels("torch", CUDA) == "torch"
    assert resolve_kernels("triton", CUDA) == "triton"
    assert lm_steer_backend("auto", CPU, max_rows=1024) is torch_grouped
    assert lm_steer_backend("torch", CUDA, max_rows=1) is torch_grouped


def test_few_rows_use_the_rowwise_backend_and_more_use_tiles() -> None:
    from vllm_steer.kernels.lm_steer.triton_rowwise import ROWWISE
    from vllm_steer.kernels.lm_steer.triton_tiled import TILED

    assert lm_steer_backend("auto", CUDA, max_rows=1) is ROWWISE
    assert lm_steer_backend("auto", CUDA, max_rows=FEW_ROWS) is ROWWISE
    assert lm_steer_backend("auto", CUDA, max_rows=FEW_ROWS + 1) is TILED
    assert lm_steer_backend("triton", CUDA, max_rows=1024) is TILED


def test_a_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        KernelError, match=r"^kernels is 'cuda'; expected one of auto, triton, torch$"
    ):
        resolve_kernels("cuda", CUDA)


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_triton_is_refused_where_it_is_not_installed(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = (
        f"^kernels is {kernels} on cuda, and triton is not installed; install it, or set "
        "kernels: torch$"
    )
    with pytest.raises(KernelError, match=expected):
        resolve_kernels(kernels, CUDA)
    assert resolve_kernels("torch", CUDA) == "torch"


def test_triton_is_refused_on_a_cpu_without_its_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    with pytest.raises(KernelError) as refused:
        resolve_kernels("triton", CPU)
    assert str(refused.value) == (
        "kernels is triton, and the device is cpu: Triton kernels need a CUDA device; set "
        "kernels: auto or torch (or TRITON_INTERPRET=1, for tests)"
    )


def test_triton_runs_on_a_cpu_in_its_interpreter_only_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = (
        "import torch; from vllm_steer.kernels.dispatch import lm_steer_backend;"
        "from vllm_steer.kernels.lm_steer import torch_grouped, triton_tiled;"
        "cpu = torch.device('cpu');"
        "backends = [lm_steer_backend(n, cpu, max_rows=9) for n in ('triton', 'auto')];"
        "print(backends[0] is triton_tiled.TILED, backends[1] is torch_grouped)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert printed.split() == ["True", "True"]


@pytest.mark.parametrize(("width", "strides"), [(63, {63, 64}), (64, {64}), (80, {80})])
def test_the_warm_up_runs_every_kind_alone_and_summed_with_the_strides_of_vllms_logits(
    width: int, strides: set[int]
) -> None:
    """Row strides that 16 divides and others are kernels of their own."""
    batches = list(warm_up.batches(weights_with(SLOTS, width), torch.bfloat16))
    assert {x.stride(0) for x, _ in batches} == strides
    for stride in strides:
        groups = [rows.groups for x, rows in batches if x.stride(0) == stride]
        assert groups == [
            ((0, 0, 1),),
            ((3, 0, 1),),
            ((1, 0, 1),),
            ((0, 0, 2), (1, 2, 4), (3, 4, 6)),
        ]
    for x, rows in batches:
        assert (x.dtype, x.shape) == (torch.bfloat16, (2, width))
        assert rows.rows.tolist() == [0] * rows.groups[-1][-1]
