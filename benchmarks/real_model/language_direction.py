"""The direction from English to French answers of a pretrained model, and steers made of it.

With ``m_f`` and ``m_e`` the mean of the answers' tokens in French and in English, by layer:

    w = m_f - m_e                   the direction
    w - (w . m) m / |m|^2           the centred one, with m = (m_f + m_e) / 2

The centred direction has none of what both languages share: along it their means are at equal
distances from 0, on its two sides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.real_model.experiment import language_model
from vllm_steer import VectorSteer

FIRST_TO_FIT: Final = 250
"""The rows of the data from here on are for the fit, those before for prompts."""
PAIRS: Final = 120
OPENING: Final = 6
SHORTEST: Final = 12


@dataclass(frozen=True)
class Means:
    """The mean over the tokens of French and of English answers, ``[layers, width]`` float64."""

    french: torch.Tensor
    english: torch.Tensor

    @property
    def direction(self) -> torch.Tensor:
        """``w`` of each layer."""
        return self.french - self.english

    @property
    def common(self) -> torch.Tensor:
        """What both means share: their mean."""
        return (self.french + self.english) / 2

    def centred(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors ``[layers, width]`` without their part along what both means share."""
        common = self.common
        along = (vectors * common).sum(-1, keepdim=True) / (common * common).sum(-1, keepdim=True)
        return vectors - along * common

    def positions(self, vectors: torch.Tensor) -> tuple[list[float], list[float]]:
        """Where the means lie along the vectors' directions, French and English, by layer."""
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        french, english = ((mean * unit).sum(-1).tolist() for mean in (self.french, self.english))
        return french, english


def fit_means(model: str, data: Path, site: Any) -> Means:
    """The means of the answers to the questions after the first 250, in every layer."""
    from vllm_steer.fit.activations import all_layers, read_tokens
    from vllm_steer.fit.vector import encode_text

    language = language_model(model, "float32")
    means = []
    for name in ("FRA", "ENG"):
        texts = [(f"Q:{row.input}\nA:", row.output) for row in _rows(data, name)[FIRST_TO_FIT:]]
        encoded = (encode_text(language.tokenizer, text, "answer", 512) for text in texts[:PAIRS])
        rows = read_tokens(
            language.model, encoded, site=site, layers=all_layers(language.model), batch_size=16
        )
        means.append(torch.cat([one.double() for one in rows]).mean(0))
    return Means(*means)


def removed(vectors: torch.Tensor, site: Any = "resid") -> VectorSteer:
    """Directional ablation along the vectors ``[layers, width]``, in all layers."""
    return VectorSteer(
        vectors=vectors.float(), layers=tuple(range(len(vectors))), site=site, mode="project"
    )


def held(vectors: torch.Tensor, layer: int, start: float, end: float) -> VectorSteer:
    """One layer whose part along its vector is held on the side of ``end``, seen from ``start``."""
    low, high = (-math.inf, end) if start > end else (end, math.inf)
    return VectorSteer(
        vectors=vectors[layer : layer + 1].float(),
        layers=(layer,),
        mode="project",
        low=low,
        high=high,
    )


def openings(data: Path, name: str, rows: range) -> list[str]:
    """The first words of the longer answers among some rows of a language."""
    words = [row.output.split() for row in _rows(data, name)[rows.start : rows.stop]]
    return [" ".join(each[:OPENING]) for each in words if len(each) >= SHORTEST]


def _rows(data: Path, name: str) -> Sequence[Any]:
    from vllm_steer.texts.icl import read_examples

    return read_examples(data / f"{name}.json")


def save(steers: Mapping[str, VectorSteer], folder: Path) -> dict[str, Path]:
    """Write the steers; the files by name."""
    from vllm_steer import save_steer

    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: (folder / f"{name}.safetensors").absolute() for name in steers}
    for name, path in paths.items():
        save_steer(steers[name], path)
    return paths
