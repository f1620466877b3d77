"""The served model: a folder with a tokenizer, and a steer config per kind of steering."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.dummy_model import (
    SHAPES,
    STRENGTH,
    ModelShape,
    steer_config,
    write_model,
    write_steers,
    write_vectors,
)

BASE = "base"
KINDS = ("steered", "guided")


@dataclass(frozen=True)
class ServedModel:
    """A model folder and its steer configs."""

    folder: Path
    shape: ModelShape
    configs: dict[str, dict[str, Any]]

    def models(self, kind: str, distinct: int) -> list[str]:
        """The model names of requests, round-robin: ``distinct`` presets, or the plain name."""
        return [f"{BASE}:{kind}{i}" for i in range(distinct)] if distinct else [BASE]


def write_served_model(shape: str, folder: Path, *, presets: int, rank: int) -> ServedModel:
    """Write a dummy model with ``presets`` presets per kind, ``steered0``, ..., ``guided0``, ...

    Each ``steered`` preset is its own LM-Steer, each ``guided`` preset its own strength of one
    vector that is added in every layer.
    """
    sizes = SHAPES[shape]
    model = write_model(sizes, folder / "model")
    write_tokenizer(sizes.vocab_size, model)
    steers = write_steers(sizes, folder / "steers", count=presets, rank=rank)
    vector = write_vectors(sizes, folder / "steers")["guided"]
    configs = {
        "steered": steer_config(steers, rank),
        "guided": steer_config({"guided": vector}, rank=1),
    }
    for i in range(presets):
        configs["steered"].setdefault("presets", {})[f"steered{i}"] = {f"s{i}": STRENGTH}
        configs["guided"].setdefault("presets", {})[f"guided{i}"] = {"guided": STRENGTH + i / 8}
    return ServedModel(model, sizes, configs)


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """Write a tokenizer with one word per token id, split at spaces: any ids decode to a text of as
    many tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
