"""Steers, steer configs and requests of the tests that load steers into a real server."""

import json
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from server_process import BASE, model_sizes

from vllm_steer import LMSteer, VectorSteer, load_steer, save_steer
from vllm_steer.runtime.registry import FILE

KEY = "key-of-changes"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
ROOM = {"lm_steers": 3, "max_rank": 16, "vectors": 4, "delta_steps": 0}
SMALL = ("--num-gpu-blocks-override=64", f"--served-model-name={BASE}")
BODY: dict[str, Any] = {
    "model": BASE,
    "prompt": "Once upon a time",
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
}


def write_runtime_config(folder: Path) -> Path:
    """A config without steers, that may load those of ``folder``; its state is in ``state``."""
    (folder / "state").mkdir(exist_ok=True)
    runtime = {
        "enabled": True,
        "folders": [str(folder)],
        "room": ROOM,
        "state": str(folder / "state"),
    }
    path = folder / "steers.yaml"
    path.write_text(yaml.safe_dump({"steers": {}, "runtime": runtime}))
    return path


def write_steers(folder: Path) -> dict[str, Path]:
    """Three vectors and an LM-Steer, each of which changes the greedy text."""
    hidden_size, _ = model_sizes()
    paths = {}
    for name, seed in (("v0", 0), ("v1", 1), ("v2", 2), ("l0", 3)):
        generator = torch.Generator().manual_seed(seed)
        if name.startswith("v"):
            vectors = torch.randn(2, hidden_size, generator=generator)
            steer: Any = VectorSteer(vectors=vectors, layers=(1, 2))
        else:
            one, two = torch.randn(2, 1, hidden_size, 8, generator=generator)
            steer = LMSteer(
                variant="multiply",
                projector1=one,
                projector2=two,
                epsilon=1 / hidden_size,
                hidden_size=hidden_size,
            )
        paths[name] = folder / f"{name}.safetensors"
        save_steer(steer, paths[name])
    return paths


def load(url: str, name: str, path: Path, timeout: float = 60, **options: Any) -> httpx.Response:
    body = {"steer_name": name, "steer_path": str(path), **options}
    return httpx.post(f"{url}/v1/load_steer", json=body, headers=AUTHORIZED, timeout=timeout)


def ask(url: str, steer: Any = None, **fields: Any) -> httpx.Response:
    """One request over a connection of its own."""
    body = {**BODY, **({} if steer is None else {"steer": steer}), **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def text_and_header(reply: httpx.Response) -> tuple[str, str]:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"], reply.headers["x-steer"]


def named_in(state: Path) -> dict[str, Path]:
    """The steers that a state folder names, all of whose files are whole."""
    steers = json.loads((state / FILE).read_text())["steers"] if (state / FILE).exists() else {}
    paths = {name: Path(steer["path"]) for name, steer in steers.items()}
    for path in paths.values():
        load_steer(path)
    return paths
