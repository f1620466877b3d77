"""The steers that are loaded at run time, and the steer config of the server."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from vllm_steer import DeltaSteer, LMSteer, Steer, SteerConfig, VectorSteer, embedded, save_steer
from vllm_steer.planned_steer import load_entry
from vllm_steer.steers.content import content_digest

HIDDEN: Final = 128
DELTA_STEPS: Final = 8
ROOM: Final[dict[str, Any]] = {
    "lm_steers": 6,
    "max_rank": 16,
    "vectors": 10,
    "delta_steps": 3 * DELTA_STEPS,
    "sites": ["resid", "heads"],
}
KEY: Final = "key-of-changes"


@dataclass(frozen=True)
class Content:
    """One steer's file: its name here, its region of the reserved room, path and text in base64."""

    name: str
    region: str
    path: Path
    data: str


def make_contents(folder: Path, count: int) -> list[Content]:
    """``count`` steers of each of three kinds, written to ``folder``."""
    makers = {"lm_steers": _lm_steer, "vectors": _vector, "delta_steps": _delta}
    contents = []
    for region, make in makers.items():
        for seed in range(count):
            path = folder / f"{region}-{seed}.safetensors"
            save_steer(make(torch.Generator().manual_seed(seed)), path)
            data = base64.b64encode(path.read_bytes()).decode()
            contents.append(Content(path.stem, region, path, data))
    return contents


def write_config(folder: Path) -> Path:
    """The embedded steers, and room for those that are loaded from ``folder``."""
    config = yaml.safe_load(embedded.STEER_CONFIG.read_text())
    for steer in config["steers"].values():
        steer["path"] = str(embedded.STEER_CONFIG.parent / steer["path"])
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


def _delta(generator: torch.Generator) -> Steer:
    delta = torch.randn(DELTA_STEPS, 4, HIDDEN, generator=generator)
    return DeltaSteer(delta=delta, layers=(0, 1, 2, 3))
