"""The steers that are loaded at run time, and the steer config of the server."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from vllm_steer import (
    DeltaSteer,
    LMSteer,
    LowRankSteer,
    SAESteer,
    Steer,
    SteerConfig,
    VectorSteer,
    embedded,
    save_steer,
)
from vllm_steer.planned_steer import load_entry
from vllm_steer.steers.content import content_digest

HIDDEN: Final = 128
DELTA_STEPS: Final = 8
ROOM: Final[dict[str, Any]] = {
    "lm_steers": 6,
    "max_rank": 16,
    "vectors": 10,
    "delta_steps": 3 * DELTA_STEPS,
    "low_rank_maps": 3,
    "max_map_rank": 4,
    "modes": ["add", "rotate", "scale"],
    "sites": ["resid", "heads"],
}
_MORE: Final[dict[str, dict[str, Any]]] = {
    "ablate-french": {"path": "french-vector", "mode": "project"},
    # At the prompts of ``cases`` each holds for some; none of their similarities is within 0.005.
    "formal-prompt": {
        "path": "formality-vector",
        "kind": "condition",
        "layers": 1,
        "threshold": 0.042,
    },
    "praising-prompt": {
        "path": "sentiment-vector",
        "kind": "condition",
        "tokens": "any",
        "threshold": 0.13,
    },
}
"""Other uses of the embedded vectors: an ablation, and conditions."""
KEY: Final = "key-of-changes"


@dataclass(frozen=True)
class Content:
    """One steer's file: its name here, its region of the reserved room, path and text in base64."""

    name: str
    region: str
    path: Path
    data: str


def make_contents(folder: Path, count: int) -> list[Content]:
    """``count`` steers of each of five kinds, written to ``folder``."""
    makers = (
        ("lm_steers", _lm_steer),
        ("vectors", _vector),
        ("delta_steps", _delta),
        ("low_rank_maps", _low_rank),
        ("vectors", _feature),
    )
    contents = []
    for region, make in makers:
        for seed in range(count):
            path = folder / f"{make.__name__[1:]}-{seed}.safetensors"
            save_steer(make(torch.Generator().manual_seed(seed)), path)
            data = base64.b64encode(path.read_bytes()).decode()
            contents.append(Content(path.stem, region, path, data))
    return contents


def write_config(folder: Path) -> Path:
    """The embedded steers, and room for those that are loaded from ``folder``."""
    config = yaml.safe_load(embedded.STEER_CONFIG.read_text())
    for steer in config["steers"].values():
        steer["path"] = str(embedded.STEER_CONFIG.parent / steer["path"])
    config["steers"] |= {name: {**entry, "path": _embedded(entry)} for name, entry in _MORE.items()}
    config["runtime"] = {
        "enabled": True,
        "folders": [str(folder)],
        "room": ROOM,
        "state": str(folder / "state"),
    }
    (folder / "state").mkdir()
    path = folder / "steers.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _embedded(entry: dict[str, Any]) -> str:
    """The file of an embedded steer."""
    return str(embedded.STEERS / f"{entry['path']}.safetensors")


def digests_of(config: Path) -> dict[str, str]:
    """The first 12 digits of the digest of each steer of a config."""
    steers = SteerConfig.load(config).steers
    return {name: content_digest(load_entry(name, one))[:12] for name, one in steers.items()}


def _lm_steer(generator: torch.Generator) -> Steer:
    projectors = torch.randn(2, 1, HIDDEN, 8, generator=generator)
    return LMSteer(
        variant="multiply",
        projector1=projectors[0],
        projector2=projectors[1],
        epsilon=1 / HIDDEN,
        hidden_size=HIDDEN,
    )


def _vector(generator: torch.Generator) -> Steer:
    return VectorSteer(vectors=torch.randn(2, HIDDEN, generator=generator), layers=(1, 2))


def _low_rank(generator: torch.Generator) -> Steer:
    a, b = torch.randn(2, 2, 3, HIDDEN, generator=generator)
    return LowRankSteer(a=a / HIDDEN**0.5, b=b.transpose(1, 2), layers=(1, 2))


def _feature(generator: torch.Generator) -> Steer:
    """Scaled by what it reads, which is not 0 for most tokens."""
    encoder, decoder = torch.randn(2, 1, HIDDEN, generator=generator)
    one = torch.ones(1)
    return SAESteer(
        encoder=encoder / HIDDEN**0.5,
        decoder=decoder,
        bias=one,
        threshold=0 * one,
        layers=(2,),
        mode="scale",
    )


def _delta(generator: torch.Generator) -> Steer:
    delta = torch.randn(DELTA_STEPS, 4, HIDDEN, generator=generator)
    return DeltaSteer(delta=delta, layers=(0, 1, 2, 3))
