"""The bank of the layers: its tables, and projected directions at the heads."""

from typing import Any

import pytest
import torch
from guidance import WIDTH, delta, head, vector
from torch import nn

from vllm_steer import SteerError
from vllm_steer.bank import DirectionRange, SiteTable
from vllm_steer.bank.layers import LayerBank, fill_layer_bank
from vllm_steer.families import Family, decoder_layers
from vllm_steer.serving.layers import projections

CPU = torch.device("cpu")
STEERS: dict[str, Any] = {
    "turn": vector((0, 3), mode="rotate", seed=1),
    "add": vector((3, 5), seed=2),
    "walk": delta(3, (0, 5), site="resid", seed=3),
    "norm": vector((1,), site="attn_in", seed=4),
}


def fill(steers: dict[str, Any] = STEERS, layers: Any = range(6), **options: Any) -> LayerBank:
    options.setdefault("project", lambda _, rows: pytest.fail("nothing is at the heads"))
    return fill_layer_bank(steers, layers=layers, device=CPU, **options)


def table_of(bank: LayerBank, site: str) -> SiteTable:
    (tables,) = [table for table in bank.tables if table.site == site]
    return tables


def unit(vector: torch.Tensor) -> torch.Tensor:
    length = sum(x * x for x in vector.tolist()) ** 0.5
    return torch.tensor([x / length for x in vector.tolist()])


def test_a_table_holds_every_steer_in_its_layers_and_zeros_elsewhere() -> None:
    table = table_of(fill(), "resid")
    assert table.layers == (0, 3, 5)
    assert table.entries == {
        "add": DirectionRange(1, None, (3, 5)),
        "turn": DirectionRange(2, None, (0, 3)),
        "walk": DirectionRange(3, 3, (0, 5)),
    }
    turn, add, walk = (STEERS[name] for name in ("turn", "add", "walk"))
    expected = torch.zeros(3, 6, WIDTH)
    expected[1, 1], expected[2, 1] = add.vectors[0], add.vectors[1]
    expected[0, 2], expected[1, 2] = unit(turn.vectors[0]), unit(turn.vectors[1])
    for step in range(3):
        expected[0, 3 + step], expected[2, 3 + step] = walk.delta[step, 0], walk.delta[step, 1]
    torch.testing.assert_close(table.directions.vectors, expected, rtol=1e-6, atol=0)
    assert torch.equal(table.directions.vectors == 0, expected == 0)
    assert table.directions.vectors.dtype == torch.float32
    assert table.directions.is_rotation is not None
    assert table.directions.is_rotation.tolist() == [0, 0, 1, 0, 0, 0]


def test_each_site_has_a_table_of_its_own_and_the_inner_one_comes_first() -> None:
    steers = {
        "d": vector((0,), site="resid"),
        "c": vector((0,), site="attn_out"),
        "b": delta(1, (0,)),
        "a": vector((0,), site="attn_in"),
    }
    bank = fill(steers, project=lambda _, rows: rows)
    assert [(s.site, list(s.entries)) for s in bank.tables] == [
        ("attn_in", ["a"]), ("heads", ["b"]), ("attn_out", ["c"]), ("resid", ["d"]),
    ]  # fmt: skip


def test_direction_rows_follow_the_names_and_not_the_order_of_the_config() -> None:
    backwards = dict(reversed(STEERS.items()))
    for one, other in zip(fill().tables, fill(backwards).tables, strict=True):
        assert one.entries == other.entries
        assert torch.equal(one.directions.vectors, other.directions.vectors)


@pytest.mark.parametrize(
    ("stage_layers", "layers"),
    [([0, 1, 2], (0,)), ([3, 4, 5], (3, 5)), ([4], None), ([], None), ([5, 3, 0], (0, 3, 5))],
    ids=str,
)
def test_a_pipeline_stage_has_its_own_layers_only(stage_layers: list[int], layers: Any) -> None:
    bank = fill(layers=stage_layers)
    tables = [table for table in bank.tables if table.site == "resid"]
    if layers is None:
        assert tables == []
        return
    (table,) = tables
    whole = table_of(fill(), "resid")
    assert (table.layers, table.entries) == (layers, whole.entries)
    rows = [whole.layers.index(layer) for layer in layers]
    assert torch.equal(table.directions.vectors, whole.directions.vectors[rows])


def test_a_site_without_rotation_needs_no_norms() -> None:
    assert table_of(fill(), "attn_in").directions.is_rotation is None
    assert table_of(fill({"add": STEERS["add"]}), "resid").directions.is_rotation is None


def test_a_pipeline_stage_without_rotated_layers_knows_of_rotations() -> None:
    """Its table has the direction; which of them turn does not depend on the rank."""
    table = table_of(fill(layers=[5]), "resid")
    assert table.directions.is_rotation is not None
    assert table.directions.is_rotation.tolist() == [0, 0, 1, 0, 0, 0]
    assert torch.equal(table.directions.vectors[:, 2], torch.zeros(1, WIDTH))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_any_floating_dtype_and_size_is_normalized_to_a_unit_vector(
    dtype: torch.dtype, scale: float
) -> None:
    steer = vector((0,), mode="rotate")
    tensor = (steer.vectors * scale).to(dtype)
    table = table_of(fill({"a": type(steer)(vectors=tensor, layers=(0,), mode="rotate")}), "resid")
    tables = table.directions.vectors[0, 1]
    torch.testing.assert_close(tables, unit(tensor[0].double()), rtol=1e-6, atol=1e-8)


def test_the_bank_reports_its_size() -> None:
    assert fill().num_bytes == 4 * WIDTH * (3 * 6 + 1 * 2)
    assert fill({}).num_bytes == 0


def test_changing_a_steer_later_does_not_change_the_bank() -> None:
    steer = vector((0,))
    table = table_of(fill({"a": steer}), "resid")
    before = table.directions.vectors.clone()
    steer.vectors.zero_()
    assert torch.equal(table.directions.vectors, before)


HEADS, HIDDEN = 6, 4


class Projection(nn.Module):
    """Like vLLM's row-parallel layer on one rank, but leaving the sum over ranks to the test."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rank: int, of: int) -> None:
        super().__init__()
        own_width = weight.shape[1] // of
        self.weight = nn.Parameter(weight[:, rank * own_width : (rank + 1) * own_width].clone())
        self.bias = bias if rank == 0 else None
        self.input_size, self.input_size_per_partition = weight.shape[1], own_width
        self.tp_rank = rank

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        y = x @ self.weight.T
        return (y if self.bias is None else y + self.bias), None


class Wrapped(nn.Module):
    """A LoRA wrapper: another layer around the projection, which must not be called."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def weights(layer: int) -> torch.Tensor:
    return torch.randn(HIDDEN, HEADS, generator=torch.Generator().manual_seed(layer))


def model_of(
    *, rank: int = 0, of: int = 1, bias: float | None = None, wrapped: bool = False
) -> nn.Module:
    """Three blocks with random projections."""
    blocks = nn.ModuleList()
    for layer in range(3):
        bias_tensor = None if bias is None else torch.full((HIDDEN,), bias + layer)
        projection: nn.Module = Projection(weights(layer), bias_tensor, rank, of)
        block = nn.Module()
        block.self_attn = nn.Module()
        block.self_attn.o_proj = Wrapped(projection) if wrapped else projection
        blocks.append(block)
    model = nn.Module()
    model.layers = blocks
    return model


def in_layers(model: Any, family: Family) -> tuple[Any, dict[int, Family]]:
    """The layers of a model, and the names of their modules."""
    return decoder_layers(model, 3), dict.fromkeys(range(3), family)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("bias", [None, 0.5], ids=["no-bias", "bias"])
def test_directions_at_the_heads_are_projected_by_the_output_projection(
    bias: float | None, wrapped: bool
) -> None:
    steer = delta(3, (0, 2), width=HEADS)
    project = projections(*in_layers(model_of(bias=bias, wrapped=wrapped), Family()), torch.float32)
    table = table_of(fill({"a": steer}, range(3), project=project), "heads")
    assert table.layers == (0, 2)
    for index, layer in enumerate((0, 2)):
        expected = steer.delta[:, index].double() @ weights(layer).double().T
        tables = table.directions.vectors[index]
        assert torch.equal(tables[0], torch.zeros(HIDDEN))
        torch.testing.assert_close(tables[1:].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", [2, 3])
def test_the_parts_of_tensor_parallel_ranks_sum_to_the_whole(of: int) -> None:
    rows = delta(5, (1,), width=HEADS).delta[:, 0]
    whole = projections(*in_layers(model_of(bias=0.5), Family()), torch.float32)(1, rows)
    parts = [
        projections(*in_layers(model_of(rank=r, of=of, bias=0.5), Family()), torch.float32)(1, rows)
        for r in range(of)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    assert all(part.abs().sum() > 0 for part in parts)


def test_a_projection_runs_in_the_models_dtype_and_gives_float32() -> None:
    model = model_of(bias=2.0).to(torch.bfloat16)
    for block in model.layers:
        block.self_attn.o_proj.bias = block.self_attn.o_proj.bias.to(torch.bfloat16)
    tables = projections(*in_layers(model, Family()), torch.bfloat16)(
        0, delta(2, (0,), width=HEADS).delta[:, 0]
    )
    assert tables.dtype == torch.float32
    assert not tables.requires_grad
    expected = delta(2, (0,), width=HEADS).delta[:, 0] @ weights(0).T
    torch.testing.assert_close(tables, expected, rtol=0.02, atol=0.1)


def test_a_model_whose_first_weights_are_packed_integers_is_projected_in_its_own_dtype() -> None:
    model = model_of()
    packed = nn.Module()
    packed.qweight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    packed.layers = model.layers
    rows = delta(2, (0,), width=HEADS).delta[:, 0]
    tables = projections(*in_layers(packed, Family()), torch.float32)(0, rows)
    torch.testing.assert_close(tables, rows @ weights(0).T)


def test_a_delta_that_overflows_in_the_projection_is_refused() -> None:
    """Its table would make a NaN of every token whose map names it, at strength 0 too."""
    model = model_of().to(torch.float16)
    project = projections(*in_layers(model, Family()), torch.float16)
    steer = delta(2, (0, 2), width=HEADS)
    steer.delta[1, 1, 0] = 1e5
    with pytest.raises(
        SteerError, match="steer a has values at the heads of layer 2 beyond the ra"
    ):
        fill({"a": steer}, range(3), project=project)
    fill({"a": steer}, range(2), project=project)


def test_heads_of_another_width_are_refused() -> None:
    project = projections(*in_layers(model_of(), Family()), torch.float32)
    with pytest.raises(SteerError, match="a steer at heads is 5 wide; the model's heads are 6"):
        project(0, torch.ones(2, 5))


def test_an_attention_without_the_projection_is_refused() -> None:
    project = projections(*in_layers(model_of(), Family(projection="dense")), torch.float32)
    with pytest.raises(SteerError, match="Module has no dense: the site heads does not exist"):
        project(0, torch.ones(2, HEADS))


def test_a_steer_at_the_head_is_not_in_the_layer_tables() -> None:
    assert head().layers is None
    assert fill({}).tables == ()
