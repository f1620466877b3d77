"""Registers, shared memory and spills of every Triton kernel, compiled without a GPU.

Inside ``compiling``, operations run on tables in host memory as in an engine; every launch is
compiled for sm_90 instead of executed, and the assembler reports the resources.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from vllm_steer.kernels.lm_steer import Constant, Dense, LowRank, SteerWeights

SM_90 = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Resources:
    """The resources of one thread or block of a compiled kernel; spills are in bytes per thread."""

    registers: int
    shared_bytes: int
    spilled_bytes: int
    tensor_cores: bool


class AbsentDriver:
    """A Triton driver that emulates a Hopper GPU: sufficient to compile, not to launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return SM_90


@contextmanager
def compiling() -> Iterator[dict[tuple[str, str], Any]]:
    """Context in which launches only compile; yields the compiled kernels by name and hash."""
    compiled: dict[tuple[str, str], Any] = {}

    def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            made = kernel.run(*args, grid=grid, warmup=True, **options)
            compiled[kernel.__name__, made.hash] = made

        return launch

    original, active = KernelInterface.__getitem__, driver._active
    driver.set_active(AbsentDriver())
    KernelInterface.__getitem__ = getitem
    try:
        yield compiled
    finally:
        KernelInterface.__getitem__ = original
        driver.set_active(active)


def resources(compiled: Any) -> Resources:
    """The assembler's report on a compiled kernel."""
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source)]
        process = subprocess.run(
            [*command, "-o", f"{folder}/cubin"], check=True, capture_output=True, text=True
        )
    output = process.stdout + process.stderr
    return Resources(
        registers=_number(r"Used (\d+) registers", output),
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=_number(r"(\d+) bytes spill stores", output),
        tensor_cores="wgmma" in ptx or "mma.sync" in ptx,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the assembler did not say {pattern!r}:\n{text}")
    return int(match[1])


def lm_steer_tables(width: int, rank: int, dtype: torch.dtype) -> SteerWeights:
    """Tables with a slot of each kind, with fixed columns."""
    return SteerWeights(
        slots=(LowRank(0, rank, 2 * rank, 1.0), Dense(0, 1, 1.0), Constant(0, 1, 1.0)),
        shrink=torch.empty(2 * rank, width, dtype=dtype),
        expand=torch.empty(2 * rank, width, dtype=dtype),
        dense=torch.empty(2, width, width, dtype=dtype),
        vectors=torch.empty(2, width, dtype=dtype),
    )
