"""A real ``vllm serve`` on a free port, its steers, and the end of its process group."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from vllm_steer import DeltaSteer, LMSteer, Steer, VectorSteer, embedded, save_steer

BASE = "base"
START_LIMIT_S = 240.0
VLLM = ("-m", "vllm.entrypoints.cli.main")
FRIENDLY = {"a": 3.0}
LIMITS = {"max_steers_per_request": 2, "max_strength": 10}


@dataclass(frozen=True)
class Server:
    """A running server and the ``steers`` of its config."""

    url: str
    steers: dict[str, Steer]
    log: Path


def model_sizes() -> tuple[int, int]:
    """Hidden size and vocabulary size of the embedded model."""
    config = json.loads((embedded.MODEL / "config.json").read_text())
    return config["hidden_size"], config["vocab_size"]


def random_steers() -> dict[str, Steer]:
    """Each variant at the head, a vector and a delta, strong enough to change the greedy text."""
    hidden_size, vocab_size = model_sizes()
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "a": LMSteer(
            variant="multiply",
            projector1=normal(2, hidden_size, 8),
            projector2=normal(2, hidden_size, 8),
            epsilon=1 / hidden_size,
            hidden_size=hidden_size,
            fixed_columns=(1,),
        ),
        "b": LMSteer(
            variant="add", add=normal(1, hidden_size), epsilon=0.5, hidden_size=hidden_size
        ),
        "c": LMSteer(
            variant="offset", offset=normal(1, vocab_size), epsilon=1.0, hidden_size=hidden_size
        ),
        "d": DeltaSteer(delta=normal(6, 4, hidden_size), layers=(0, 1, 2, 3)),
        "v": VectorSteer(vectors=normal(2, hidden_size), layers=(1, 2)),
    }


def write_config(folder: Path, steers: dict[str, Steer]) -> Path:
    for name, steer in steers.items():
        save_steer(steer, folder / f"{name}.safetensors")
    config = {
        "steers": {name: {"path": f"{name}.safetensors"} for name in steers},
        "presets": {"friendly": FRIENDLY, "mix": {"a": 1.5, "c": -1}},
        "limits": LIMITS,
    }
    path = folder / "steers.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment() -> dict[str, str]:
    """The outer environment without the variables that this process's engines set."""
    outer = {name: value for name, value in os.environ.items() if name != "VLLM_STEER_ACTIVE"}
    outer.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return outer | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


def serve_command(*options: str, program: Sequence[str] = VLLM) -> list[str]:
    return [
        sys.executable,
        *program,
        "serve",
        str(embedded.MODEL),
        "--host=127.0.0.1",
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=256",
        "--max-num-seqs=16",
        *options,
    ]


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def serving(log: Path, options: Sequence[str]) -> Iterator[str]:
    """Run ``vllm serve`` until it answers; yields its address and ends its process group."""
    with serving_process(log, options) as (_, url):
        yield url


@contextmanager
def serving_process(
    log: Path, options: Sequence[str], program: Sequence[str] = VLLM
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``serving``, with its process, the leader of a session."""
    with started(log, options, program) as (process, url):
        _wait_until_ready(process, url, log)
        yield process, url


@contextmanager
def started(
    log: Path, options: Sequence[str], program: Sequence[str] = VLLM
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``serving_process`` of a server that may never answer."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve_command(f"--port={port}", *options, program=program),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        end(process)


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"vllm serve ended with {process.returncode}:\n{tail(log)}")
        with contextlib.suppress(httpx.TransportError):  # it does not listen yet
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.25)
    pytest.fail(f"vllm serve was not ready after {START_LIMIT_S:.0f} s:\n{tail(log)}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: first with SIGTERM, and always before returning."""
    for signal_number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and _group_lives(process):
            time.sleep(0.1)
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
