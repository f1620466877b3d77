"""Runs the engine of the parity trials in a process of its own and reports how it ended."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Final

from vllm_steer.doctor.engine_process import EngineOutput, Job
from vllm_steer.environment import CPU_CACHE, SELF_TEST

_ENVIRONMENT: Final = {
    # In-process scheduling: requests arrive in whole batches, and equal batches run identically.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    SELF_TEST: "1",
    "OMP_WAIT_POLICY": "passive",
}
_RAISED: Final = re.compile(
    r"^(?:\(.*?\) )?(?:\[rank\d+\]: )?(?:ERROR .*?\] )?([\w.]*(?:Error|Exception|Exit): .+)$"
)
_TAIL: Final = 1 << 16
_SHOWN: Final = 500


def run_engine(job: Job, folder: Path) -> tuple[EngineOutput, str]:
    """Run a job; return its output so far and the error, empty if it finished."""
    (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    log, output_path = folder / "log.txt", folder / "answers.json"
    command = [sys.executable, "-m", "vllm_steer.doctor.engine_process", str(folder / "job.json")]
    with log.open("wb") as file:
        process = subprocess.run(
            [*command, str(output_path)],
            env=_environment(job),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    output = EngineOutput.read(output_path)
    if process.returncode == 0:
        return output, ""
    return output, _exit_reason(process.returncode, log)


def _environment(job: Job) -> dict[str, str]:
    """What the user has set, with defaults; a memory share of the engine's options stays as it
    is.
    """
    cache = {} if "gpu_memory_utilization" in job.options else CPU_CACHE
    return {**_ENVIRONMENT, **cache, **os.environ}


def _exit_reason(code: int, log: Path) -> str:
    """Why the process ended: its signal, or the last error in its log."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"the engine was killed by {name}" + (
            "; it may have run out of memory" if name == "SIGKILL" else ""
        )
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    if error := _last_error(lines):
        return f"the engine failed: {error[:_SHOWN]}"
    return f"the engine exited with code {code}; its log ends: {' '.join(lines[-3:])[:_SHOWN]}"


def _last_error(lines: Sequence[str]) -> str:
    """The last error in a log, with its indented continuation lines."""
    errors = [
        (index, match[1]) for index, line in enumerate(lines) if (match := _RAISED.match(line))
    ]
    if not errors:
        return ""
    index, first = errors[-1]
    continuation = takewhile(lambda line: line.startswith(" "), lines[index + 1 :])
    return " ".join([first, *(line.strip() for line in continuation)])
