"""The models that serve dynamic requests here, each with one step delta and one LM-Steer.

embedded  the small model that comes with the package; its French delta, its steps repeated
          until there are enough, and its sentiment steer. Its steps are mostly overhead
llama     81 M random parameters, wide enough that a step is arithmetic; random steers
tiny      a few random parameters, to see whether all of this runs
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.dummy_model import llama, random_lm_steer, steer_config, write_checkpoint
from vllm_steer import DeltaSteer, LMSteer, load_steer, save_steer

SIZES = {  # hidden, inner, layers, heads, vocabulary
    "llama": (768, 2048, 8, 12, 32000),
    "tiny": (64, 128, 2, 2, 512),
}
LOGITS_STD = 4.0  # llama's next-token distributions have about 4 nats; with 1.0, 9.9 of ln V = 10.4
NAMES = ("embedded", *SIZES)


@dataclass(frozen=True)
class Served:
    """A model folder, its steers ``delta`` and ``lm``, and what a token of it takes.

    ``head_share`` is the LM head's part of the multiplications of one token.
    """

    folder: Path
    config: dict[str, Any]
    delta: DeltaSteer
    vocab_size: int
    head_share: float


def write_served(name: str, folder: Path, *, steps: int) -> Served:
    """Write what is served, a delta of ``steps`` steps included."""
    from transformers import AutoConfig

    folder.mkdir(parents=True)
    model, delta, lm = _embedded(steps) if name == "embedded" else _random(name, folder, steps)
    paths = {"delta": folder / "delta.safetensors", "lm": folder / "lm.safetensors"}
    save_steer(delta, paths["delta"])
    save_steer(lm, paths["lm"])
    shape = AutoConfig.from_pretrained(model)
    head = shape.vocab_size * shape.hidden_size
    width = shape.num_attention_heads * shape.head_dim
    layer = shape.hidden_size * (4 * width + 3 * shape.intermediate_size)
    share = head / (head + shape.num_hidden_layers * layer)
    config = steer_config(paths, max(lm.rank, 1))
    return Served(model, config, delta, shape.vocab_size, share)


def _embedded(steps: int) -> tuple[Path, DeltaSteer, LMSteer]:
    from vllm_steer.embedded import MODEL, STEERS

    delta = load_steer(STEERS / "french-delta.safetensors")
    lm = load_steer(STEERS / "sentiment.safetensors")
    assert isinstance(delta, DeltaSteer) and isinstance(lm, LMSteer)
    rows = torch.arange(steps) % delta.steps
    return MODEL, DeltaSteer(delta=delta.delta[rows], layers=delta.layers, site=delta.site), lm


def _random(name: str, folder: Path, steps: int) -> tuple[Path, DeltaSteer, LMSteer]:
    hidden, _, layers, _, _ = SIZES[name]
    shape = llama(*SIZES[name], initializer_range=hidden**-0.5, bos_token_id=0, eos_token_id=1)
    model = write_checkpoint(shape, folder / "model", torch.float32, norm=LOGITS_STD)
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(steps, layers, hidden, generator=generator) * 0.2
    lm = random_lm_steer(hidden, min(1000, hidden), 0.2, generator)
    return model, DeltaSteer(delta=delta, layers=tuple(range(layers)), site="heads"), lm
