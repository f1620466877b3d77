"""The doctor's report of memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from doctor_tools import add_steer, by_name

from vllm_steer import DeltaSteer, LMSteer, SteerError, VectorSteer, save_steer
from vllm_steer.bank import (
    HeadRoom,
    LayerRoom,
    SiteRoom,
    fill_condition_tables,
    fill_head_bank,
    fill_layer_bank,
)
from vllm_steer.doctor.architecture import read_architecture
from vllm_steer.doctor.memory import config_memory, example_memory, memory_use


def many_steers() -> dict[str, Any]:
    torch.manual_seed(0)
    multiply = {"variant": "multiply", "epsilon": 0.1, "hidden_size": 128}
    pair = torch.randn(2, 128, 5)
    wide = torch.randn(1, 128, 70)
    return {
        "low": LMSteer(**multiply, projector1=pair, projector2=pair, fixed_columns=(1,)),
        "dense": LMSteer(**multiply, projector1=wide, projector2=wide),
        "add": add_steer(),
        "tilt": LMSteer(
            variant="offset",
            offset=torch.randn(2, 1536),
            epsilon=1,
            hidden_size=128,
            fixed_columns=(0,),
        ),
        "push": VectorSteer(vectors=torch.randn(4, 128), layers=(0, 1, 2, 3)),
        "turn": VectorSteer(vectors=torch.randn(2, 128), layers=(1, 3), mode="rotate"),
        "lean": VectorSteer(vectors=torch.randn(1, 128), layers=(2,), site="attn_in"),
        "steps": DeltaSteer(delta=torch.randn(6, 3, 128), layers=(0, 1, 3)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reported_memory_equals_that_of_real_banks(dtype: torch.dtype) -> None:
    steers = many_steers()
    use = memory_use(steers, hidden_size=128, dtype=dtype)
    heads = {name: s for name, s in steers.items() if isinstance(s, LMSteer)}
    head = fill_head_bank(heads, dtype=dtype, device=torch.device("cpu"))
    tables = [table.weights for table in (head.hidden, head.logits)]
    parts = [
        t for table in tables for t in (table.shrink, table.expand, table.dense, table.vectors)
    ]
    assert use.sites["head"] == sum(t.untyped_storage().nbytes() for t in parts)
    assert use.sites["head"] == sum(use.steers[name] for name in heads)
    inside = {name: s for name, s in steers.items() if name not in heads}
    layers = fill_layer_bank(
        inside, layers=range(4), device=torch.device("cpu"), project=lambda _, rows: rows
    )
    for table in layers.tables:
        stored = [
            t for t in (table.directions.vectors, table.directions.is_rotation) if t is not None
        ]
        assert use.sites[table.site] == sum(t.untyped_storage().nbytes() for t in stored)
    assert use.total == sum(use.sites.values())


def test_memory_of_each_steer_by_hand() -> None:
    use = memory_use(many_steers(), hidden_size=128, dtype=torch.bfloat16).steers
    assert use["low"] == 2 * (2 * 5) * 128 * 2
    assert use["dense"] == 128 * 128 * 2  # fewer bytes than 2 * 70 * 128
    assert use["add"] == 128 * 2
    assert use["tilt"] == 2 * 1536 * 2
    assert use["steps"] == 6 * 3 * 128 * 4  # float32 in every model
    # At resid a steer rotates: there each direction also has a number that says whether it does.
    assert use["push"] == use["turn"] == 4 * 128 * 4 + 4


def test_a_config_that_fits_and_one_steer_that_does_not(tmp_path: Path) -> None:
    wide = VectorSteer(vectors=torch.ones(1, 64), layers=(0,))
    deep = VectorSteer(vectors=torch.ones(2, 128), layers=(0, 9))
    for name, steer in {"good": add_steer(), "wide": wide, "deep": deep}.items():
        save_steer(steer, tmp_path / f"{name}.safetensors")
    entries = "".join(f"  {n}: {{path: {n}.safetensors}}\n" for n in ("good", "wide", "deep"))
    (tmp_path / "steers.yaml").write_text(f"steers:\n{entries}limits: {{max_steers: 7}}\n")
    architecture = read_architecture("embedded")
    findings = by_name(config_memory(architecture, tmp_path / "steers.yaml", torch.float32))
    assert findings["good"].figures == {"bytes": 128 * 4}
    assert findings["wide"].state == findings["deep"].state == "FAILED"
    assert "is 64 wide; the site resid of this model is 128" in findings["wide"].message
    assert "layer 9 does not exist" in findings["deep"].message
    assert findings["all steers"].figures["bytes"] == 128 * 4
    assert findings["limits"].message.startswith("max_steers 7, max_rank 1024, ")


def test_the_room_for_loading_is_what_the_banks_reserve(tmp_path: Path) -> None:
    room = {"lm_steers": 3, "max_rank": 20, "offsets": 2, "vectors": 5, "delta_steps": 7}
    room |= {"low_rank_maps": 2, "max_map_rank": 3, "conditions": 4, "modes": ["add", "clamp"]}
    (tmp_path / "steers.yaml").write_text(
        yaml.safe_dump({"runtime": {"enabled": True, "room": {**room, "sites": ["resid"]}}})
    )
    architecture = read_architecture("embedded")
    findings = by_name(config_memory(architecture, tmp_path / "steers.yaml", torch.float16))
    layers = tuple(range(architecture.num_layers))
    head = fill_head_bank(
        {},
        dtype=torch.float16,
        device=torch.device("cpu"),
        room=HeadRoom(3, 2, 20, architecture.hidden_size, architecture.vocab_size),
    )
    layer_room = LayerRoom(
        {"resid": SiteRoom(layers, vectors=5, steps=7, maps=2, conditions=4)},
        architecture.hidden_size,
        frozenset({"add", "clamp"}),
        max_map_rank=3,
    )
    cpu = torch.device("cpu")
    (table,) = fill_layer_bank(
        {}, layers=layers, device=cpu, project=lambda _layer, rows: rows, room=layer_room
    ).tables
    (conditions,) = fill_condition_tables({}, layers=layers, device=cpu, room=layer_room)
    rows = [table.directions.vectors[:, 1:], conditions.conditions.vectors]  # without the zero
    rows += [table.directions.readings.vectors, *table.maps.factors]
    reserved = head.num_bytes + sum(tensor.numel() * 4 for tensor in rows)
    assert findings["room for loading"].figures["bytes"] == reserved


def test_a_config_that_is_wrong_is_an_error() -> None:
    architecture = read_architecture("embedded")
    with pytest.raises(SteerError, match=r"gone.yaml: no such file"):
        list(config_memory(architecture, "gone.yaml", torch.float32))


def test_example_steers_have_the_sizes_of_the_model() -> None:
    findings = by_name(example_memory(read_architecture("embedded"), torch.float16))
    sizes = [finding.figures["bytes"] for finding in findings.values()]
    assert sizes == [128 * 128 * 2, 4 * 128 * 4, 32 * 4 * 128 * 4]
