"""Runs jobs on hostile files, each in its own process with limits of memory and time.

As a program it reads jobs as JSON lines from standard input and writes outcomes as JSON lines to
standard output. It imports the dependencies once and forks, so that a job takes milliseconds.
"""

import contextlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY = 4 * 2**30
SECONDS = 20.0
LONGEST = 4000


def load(job: dict[str, Any]) -> str:
    """Run ``load_steer``, and build the tables of a server's start."""
    from vllm_steer import load_steer
    from vllm_steer.steers.content import content_digest

    steer = load_steer(job["path"], **job.get("overrides", {}))
    content_digest(steer)
    return f"loaded {steer!r}"


def start(job: dict[str, Any]) -> str:
    """What a server does with a config before it starts: read it, load its steers, plan."""
    from vllm_steer import SteerConfig
    from vllm_steer.plan import SteerPlan

    plan = SteerPlan.of(SteerConfig.load(job["path"] if "path" in job else job["config"]))
    return f"planned {len(plan.to_json()['steers'])} steers"


def command(job: dict[str, Any]) -> str:
    """A command of ``vllm-steer``, as its process would run it."""
    from vllm_steer.cli import main

    sys.argv = ["vllm-steer", *job["command"]]
    try:
        main()
    except SystemExit as end:
        return f"exit {end.code or 0}"
    return "exit 0"


def agree(job: dict[str, Any]) -> str:
    """Check that a ``torch.save`` file gives the same values as PyTorch's reader, if PyTorch reads
    it.
    """
    from argparse import Namespace

    import torch

    from vllm_steer.files import torch_file
    from vllm_steer.files.archive import open_archive

    with open_archive(Path(job["path"])) as archive:
        own_result = torch_file.load(
            torch_file.read_names(archive), {"argparse.Namespace": Namespace}
        )
    try:
        with torch.serialization.safe_globals([Namespace]):
            torch_result = torch.load(job["path"], weights_only=True)
    except Exception as error:
        return f"PyTorch refuses it: {type(error).__name__}"
    assert _same(own_result, torch_result), (own_result, torch_result)
    return "the same"


def _same(one: Any, other: Any) -> bool:
    import torch

    if isinstance(other, torch.Tensor):
        alike = isinstance(one, torch.Tensor) and one.dtype == other.dtype
        return alike and one.shape == other.shape and _bits(one) == _bits(other)
    if isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in other)
    if isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(other, "__dict__"):
        return _same(vars(one), vars(other))
    return type(one) is type(other) and (one == other or one != one)


def _bits(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.detach().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy())


def rows(job: dict[str, Any]) -> str:
    """Read texts and labels as a fit or an evaluation does."""
    from vllm_steer.texts import read_labelled

    return f"{len(list(read_labelled(job['path'])))} texts"


def conversations(job: dict[str, Any]) -> str:
    """Read conversations as a fit does."""
    from vllm_steer.texts.conversations import read_conversations

    return f"{len(list(read_conversations(job['path'])))} conversations"


def lexicon(job: dict[str, Any]) -> str:
    from vllm_steer.evaluation.lexicons import read_lexicon

    return f"{read_lexicon(job['path'])}"


def properties(job: dict[str, Any]) -> str:
    from vllm_steer.evaluation.composition.spec import ComparisonSpec

    return f"{len(ComparisonSpec.load(job['path']).seen)} combinations"


DOES = {
    job_function.__name__: job_function
    for job_function in (load, agree, start, command, rows, conversations, lexicon, properties)
}


def child(job: dict[str, Any], to: int) -> None:
    """Run the job within its limits and write the outcome; never returns."""
    begun = status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(job["folder"])
    out, err = Path(job["folder"], "stdout"), Path(job["folder"], "stderr")
    for stream_number, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(stream_number, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8")
    clock = time.monotonic()
    outcome: dict[str, Any] = {}
    try:
        outcome["said"] = DOES[job["does"]](job)
    except ValueError as error:
        outcome |= {"refused": str(error), "error": type(error).__name__}
    except BaseException:
        outcome["traceback"] = traceback.format_exc()[-LONGEST:]
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    outcome |= {
        "seconds": time.monotonic() - clock,
        "memory": status("VmPeak") - begun,
        "stdout": read(out),
        "stderr": read(err),
    }
    os.write(to, json.dumps(outcome).encode())
    os._exit(0)


def read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(1 << 16).decode("latin-1")


def status(name: str) -> int:
    """One of the kernel's figures of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The outcome of one job; ``signal`` or ``too_long`` if it did not end by itself."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os.setsid()
        child(job, write_end)
    os.close(write_end)
    data, end = b"", time.monotonic() + SECONDS
    while True:
        ready, _, _ = select.select([read_end], [], [], max(0, end - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            break
        part = os.read(read_end, 1 << 16)
        if not part:
            break
        data += part
    os.close(read_end)
    _, ended = os.waitpid(pid, 0)
    if data:
        return dict(json.loads(data))
    return {"too_long": True} if not ready else {"signal": ended}


def main() -> None:
    sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    import torch

    torch.set_num_threads(1)

    with contextlib.suppress(ImportError):
        import gguf  # noqa: F401
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps({**run(job), "name": job["name"]}), flush=True)


if __name__ == "__main__":
    main()
