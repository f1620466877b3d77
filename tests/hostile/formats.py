"""A good file of every format that is read, and changed copies of it."""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vllm_steer import (
    ConditionSteer,
    DeltaSteer,
    LMSteer,
    LowRankSteer,
    SAESteer,
    VectorSteer,
    save_steer,
)

Made = tuple[bytes, dict[str, Any]]


def _saved(steer: Any, folder: Path) -> bytes:
    save_steer(steer, folder / "whole")
    return (folder / "whole").read_bytes()


def vector(folder: Path) -> Made:
    recipe = {"made_with": [1, 2.5, "x"], "by": {"a": None}}
    steer = VectorSteer(
        vectors=torch.randn(3, 8),
        layers=(1, 2, 5),
        layer_scores=(0.5, 0.25, 0.75),
        description="a description",
        recipe=recipe,
    )
    return _saved(steer, folder), {}


def delta(folder: Path) -> Made:
    return _saved(DeltaSteer(delta=torch.randn(3, 2, 8), layers=(0, 3)), folder), {}


def lm_steer(folder: Path) -> Made:
    one, two = torch.randn(2, 2, 8, 3)
    steer = LMSteer(
        projector1=one,
        projector2=two,
        variant="multiply",
        epsilon=0.1,
        hidden_size=8,
        fixed_columns=(1,),
    )
    return _saved(steer, folder), {}


def projection(folder: Path) -> Made:
    steer = VectorSteer(vectors=torch.randn(2, 8), layers=(1, 2), mode="project", high=math.inf)
    return _saved(steer, folder), {}


def low_rank(folder: Path) -> Made:
    a, b, bias = torch.randn(2, 3, 8), torch.randn(2, 8, 3), torch.randn(2, 3)
    return _saved(LowRankSteer(a=a, b=b, bias=bias, layers=(1, 2)), folder), {}


def sae(folder: Path) -> Made:
    encoder, decoder = torch.randn(2, 1, 8)
    numbers = {"bias": torch.randn(1), "threshold": torch.rand(1)}
    steer = SAESteer(encoder=encoder, decoder=decoder, layers=(3,), low=1, high=2, **numbers)
    return _saved(steer, folder), {}


def condition(folder: Path) -> Made:
    return _saved(ConditionSteer(vector=torch.randn(1, 8), layers=(3,), threshold=0.5), folder), {}


def concept_guidance(folder: Path) -> Made:
    tensors = {"W": torch.randn(3, 8), "a": torch.ones(3, 1), "b": torch.ones(3)}
    save_file(tensors, folder / "whole")
    return (folder / "whole").read_bytes(), {"orient": True}


def sae_safetensors(folder: Path) -> Made:
    save_file({"W_dec": torch.randn(6, 8), "b_dec": torch.zeros(8)}, folder / "whole")
    return (folder / "whole").read_bytes(), {"feature": 3, "hook": "blocks.2.hook_resid_post"}


def sae_npz(folder: Path) -> Made:
    with (folder / "whole").open("wb") as file:
        np.savez_compressed(
            file, W_dec=np.random.default_rng(0).normal(size=(6, 8)), b_dec=np.zeros(8)
        )
    return (folder / "whole").read_bytes(), {"feature": 3, "hook": "blocks.2.hook_resid_post"}


def sae_feature(folder: Path) -> Made:
    arrays = {"W_enc": (8, 6), "W_dec": (6, 8), "b_enc": (6,), "b_dec": (8,), "threshold": (6,)}
    generator = np.random.default_rng(0)
    with (folder / "whole").open("wb") as file:
        np.savez(file, **{name: generator.random(shape) for name, shape in arrays.items()})
    facts = {"kind": "sae", "feature": 3, "hook": "blocks.2.hook_resid_post"}
    return (folder / "whole").read_bytes(), facts


def pyreft(folder: Path) -> Made:
    state = {"weight": torch.randn(3, 8), "bias": torch.randn(3), "rotate_layer": torch.randn(8, 3)}
    torch.save(state, folder / "whole")
    return (folder / "whole").read_bytes(), {"layers": "4"}


def checkpoint(folder: Path) -> Made:
    import argparse

    args = argparse.Namespace(epsilon=0.1, adaptor_class="multiply", dummy_steer=1, model_name="x")
    state = {"projector1": torch.randn(2, 8, 3), "projector2": torch.randn(2, 8, 3)}
    torch.save([args, state, 5], folder / "whole")
    return (folder / "whole").read_bytes(), {}


def by_layer(folder: Path) -> Made:
    torch.save({1: torch.randn(8), 4: torch.randn(8)}, folder / "whole")
    return (folder / "whole").read_bytes(), {}


def plain_tensor(folder: Path) -> Made:
    torch.save(torch.randn(8), folder / "whole")
    return (folder / "whole").read_bytes(), {"layers": "1-3"}


def svec(folder: Path) -> Made:
    directions = {str(layer): [0.5, -1.25, layer / 3] for layer in range(1, 5)}
    text = json.dumps({"model_type": "llama", "directions": directions, "explained_variances": {}})
    return text.encode(), {}


def svec_condition(folder: Path) -> Made:
    text, _ = svec(folder)
    return text, {"kind": "condition", "layers": 2, "threshold": 0.5}


def control_vector(folder: Path) -> Made:
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "whole", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "whole").read_bytes(), {}


FORMATS: dict[str, Callable[[Path], Made]] = {
    made.__name__: made
    for made in (
        vector,
        delta,
        lm_steer,
        projection,
        low_rank,
        sae,
        condition,
        concept_guidance,
        sae_safetensors,
        sae_npz,
        sae_feature,
        pyreft,
        checkpoint,
        by_layer,
        plain_tensor,
        svec,
        svec_condition,
        control_vector,
    )
}

_LARGE = (b"\xff\xff\xff\xff", b"\xff" * 8, b"\0\0\0\x80", struct.pack("<Q", 1 << 40), b"\0" * 8)


def variants(whole: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Changed copies: bytes set, cut, put in, doubled, swapped; lengths made huge or nothing."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            _change(data, rng)
        yield f"changed-{number}", bytes(data)


def _change(data: bytearray, rng: random.Random) -> None:
    at, length = rng.randrange(max(1, len(data))), rng.choice([1, 2, 4, 8, 50])
    how = rng.randrange(7)
    if how == 0:
        data[at : at + length] = rng.randbytes(length)
    elif how == 1:
        del data[at:]
    elif how == 2:
        del data[at : at + length]
    elif how == 3:
        data[at:at] = data[at : at + length * 20]
    elif how == 4:
        data[at : at + 8] = rng.choice(_LARGE)
    elif how == 5:
        head = rng.randrange(min(200, len(data) or 1))
        data[head : head + 4] = rng.choice(_LARGE)[:4]
    elif data:
        data[at] ^= 1 << rng.randrange(8)
