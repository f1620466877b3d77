"""Runs the scenarios of ``own_process.py``."""

import os
import subprocess
import sys
from pathlib import Path


def run_scenario(*arguments: str, **environment: str) -> str:
    """What a scenario prints; an assertion with the end of its output if it fails."""
    script = Path(__file__).with_name("own_process.py")
    process = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]
    return process.stdout
