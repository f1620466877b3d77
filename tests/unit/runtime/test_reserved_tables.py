"""A reserved place that another steer has had: what is there is of the new one alone."""

import math
from typing import Any

import torch
from guidance import vector

from vllm_steer.bank import (
    ConditionTable,
    LayerRoom,
    SiteRoom,
    SiteTable,
    fill_condition_tables,
    fill_layer_bank,
)
from vllm_steer.bank.conditions import unit_vector
from vllm_steer.kernels.guidance import GAINS
from vllm_steer.kernels.guidance.operands import CAST, DOT
from vllm_steer.steers import ConditionSteer, LowRankSteer, SAESteer

CPU = torch.device("cpu")
WIDTH, LAYERS = 5, (0, 1, 2)
MODES = frozenset({"add", "rotate", "project", "relative", "clamp", "scale"})
ROOM = LayerRoom(
    {"resid": SiteRoom(LAYERS, vectors=2, steps=3, maps=2, conditions=2)}, WIDTH, MODES, 4
)


def site_table() -> SiteTable:
    (table,) = fill_layer_bank(
        {}, layers=LAYERS, device=CPU, project=lambda _layer, rows: rows, room=ROOM
    ).tables
    return table


def fill(table: SiteTable, name: str, steer: Any, index: int = 0) -> None:
    table.fill(name, steer, index, table.tensors_of(steer))


def feature(mode: str) -> SAESteer:
    rows = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))
    ones = torch.ones(2)
    return SAESteer(
        encoder=rows, decoder=rows + 1, bias=2 * ones, threshold=3 * ones, layers=(0, 2), mode=mode
    )


def random_map(rank: int, layers: tuple[int, ...]) -> LowRankSteer:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(len(layers), rank, WIDTH, generator=generator)
    b = torch.randn(len(layers), WIDTH, rank, generator=generator)
    return LowRankSteer(a=a, b=b, layers=layers)


def test_a_vector_after_a_feature_reads_as_its_mode_says() -> None:
    table = site_table()
    readings, place = table.directions.readings, table.first_vector
    assert readings is not None and table.directions.is_rotation is not None
    fill(table, "feature", feature("clamp"))
    assert readings.reader_of[place] == 0
    assert torch.equal(readings.vectors[2, 0], feature("clamp").encoder[1])
    assert readings.bias[:, 0].tolist() == [2, 0, 2]
    assert readings.threshold[:, 0].tolist() == [3, -math.inf, 3]
    table.remove("feature")
    ablation = vector((1,), mode="project")
    fill(table, "ablation", ablation)
    unit = ablation.vectors[0] / ablation.vectors[0].norm()
    assert torch.allclose(readings.vectors[:, 0], torch.stack([0 * unit, unit, 0 * unit]))
    assert readings.bias[:, 0].tolist() == [0, 0, 0]
    assert readings.threshold[:, 0].tolist() == [-math.inf] * 3
    fill(table, "turn", vector((1,), mode="rotate"))
    assert readings.gains[place].tolist() == list(GAINS["constant"])
    assert (readings.reader_of[place], table.directions.is_rotation[place]) == (-1, 1)
    fill(table, "scaled", feature("scale"))
    assert readings.gains[place].tolist() == list(GAINS["activation"])
    assert (readings.reader_of[place], table.directions.is_rotation[place]) == (0, 0)


def test_a_map_after_one_of_a_higher_rank_in_other_layers() -> None:
    table = site_table()
    assert table.maps is not None
    fill(table, "high", random_map(4, (0, 1)), index=1)
    fill(table, "beside", random_map(2, (2,)), index=0)
    table.remove("high")
    low = random_map(3, (1, 2))
    fill(table, "low", low, index=1)
    slot = table.maps.slots["low"]
    assert table.maps.slot_of_direction[table.entries["low"].start] == slot
    start, _, end = table.maps.bounds[slot].tolist()
    for layer in LAYERS:
        weights = table.maps.weights[layer]
        product = weights.expand[start:end].T @ weights.shrink[start:end]
        expected = torch.zeros(WIDTH, WIDTH)
        if layer in low.layers:
            row = low.layers.index(layer)
            expected = low.b[row] @ low.a[row]
        assert torch.allclose(product, expected, atol=1e-6)


def test_a_condition_after_another_in_another_layer() -> None:
    (table,) = fill_condition_tables({}, layers=LAYERS, device=CPU, room=ROOM)
    first = ConditionSteer(
        vector=torch.ones(1, WIDTH), layers=(0,), threshold=0.5, similarity="cast", side="below"
    )
    second = ConditionSteer(
        vector=torch.arange(1.0, WIDTH + 1)[None], layers=(2,), threshold=-1.5, similarity="dot"
    )
    for name, steer in {"first": first, "second": second}.items():
        table.fill(name, steer, 1, unit_vector(steer))
        assert table.entries[name].layer == steer.layers[0]
        measure, sign, threshold = _test_at(table, 1)
        expected = {"first": (CAST, -1, 0.5), "second": (DOT, 1, -1.5)}[name]
        assert (measure, sign, threshold) == expected
        table.remove(name)
    expected_vector = second.vector[0] / second.vector[0].norm()
    assert torch.allclose(table.conditions.vectors[2, 1], expected_vector)
    assert table.entries == {}


def _test_at(table: ConditionTable, number: int) -> tuple[float, float, float]:
    parts = table.conditions
    return tuple(float(part[number]) for part in (parts.measure, parts.sign, parts.threshold))  # type: ignore[return-value]


def test_tables_keep_their_addresses() -> None:
    table = site_table()
    assert table.maps is not None and table.directions.readings is not None
    tensors = [
        table.directions.vectors,
        table.directions.readings.vectors,
        table.maps.weights[1].shrink,
        table.maps.weights[1].expand,
    ]
    before = [tensor.data_ptr() for tensor in tensors]
    fill(table, "map", random_map(2, (1,)))
    fill(table, "feature", feature("scale"))
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert table.maps.weights[1].shrink.any() and table.directions.readings.vectors.any()
