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
    folder.mkdir(parents=True)
    model = _embedded() if name == "embedded" else _write_random(SIZES[name], folder / "model")
    shape = _shape(model)
    delta, lm = _own_steers(steps) if name == "embedded" else _random_steers(shape, steps)
    paths = {"delta": folder / "delta.safetensors", "lm": folder / "lm.safetensors"}
    save_steer(delta, paths["delta"])
    save_steer(lm, paths["lm"])
    config = {"steers": {steer: {"path": str(path)} for steer, path in paths.items()}}
    head = shape.vocab_size * shape.hidden_size
    width = shape.num_attention_heads * shape.head_dim
    layer = shape.hidden_size * (4 * width + 3 * shape.intermediate_size)
    share = head / (head + shape.num_hidden_layers * layer)
    return Served(model, config, delta, shape.vocab_size, share)


def _embedded() -> Path:
    from vllm_steer.embedded import MODEL

    return MODEL


def _shape(model: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def _write_random(sizes: tuple[int, ...], folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, vocab = sizes
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=1024,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.model.norm.weight.data.fill_(LOGITS_STD)
    model.save_pretrained(folder)
    return folder


def _own_steers(steps: int) -> tuple[DeltaSteer, LMSteer]:
    from vllm_steer.embedded import STEERS

    delta = load_steer(STEERS / "french-delta.safetensors")
    lm = load_steer(STEERS / "sentiment.safetensors")
    assert isinstance(delta, DeltaSteer) and isinstance(lm, LMSteer)
    rows = torch.arange(steps) % delta.steps
    return DeltaSteer(delta=delta.delta[rows], layers=delta.layers, site=delta.site), lm


def _random_steers(shape: Any, steps: int) -> tuple[DeltaSteer, LMSteer]:
    generator = torch.Generator().manual_seed(1)
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    rank = min(1000, hidden)
    delta = torch.randn(steps, layers, hidden, generator=generator)
    first, second = torch.randn(2, 1, hidden, rank, generator=generator) * (rank * hidden) ** -0.25
    lm = LMSteer(
        variant="multiply", epsilon=0.2, hidden_size=hidden, projector1=first, projector2=second
    )
    return DeltaSteer(delta=delta * 0.2, layers=tuple(range(layers)), site="heads"), lm
