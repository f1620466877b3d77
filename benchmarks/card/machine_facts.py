"""The machine, its card and its software; unpacks vLLM where the pack brings it.

python -m benchmarks.card.machine_facts PACK SCRATCH JSON
"""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Unpack, look, write."""
    pack, scratch, path = map(Path, sys.argv[1:4])
    begun = time.monotonic()
    piece = pack / "vllm.tar.xz"
    if piece.exists():
        with tarfile.open(piece) as archive:
            archive.extractall(scratch / "vllm", filter="data")
    found: dict[str, Any] = {"unpacked_s": round(time.monotonic() - begun, 1)}
    import torch

    from benchmarks.machine import describe_run
    from benchmarks.operations.timing import copy_bandwidth

    found |= describe_run("card")
    found["cards"] = _nvidia_smi()
    if torch.cuda.is_available():
        found["copy_tb_per_s"] = round(copy_bandwidth(torch.device("cuda")) * 1e-12, 2)
    path.write_text(json.dumps(found, indent=1) + "\n")
    name = found["machine"]["gpu"] or "no card"
    found["summary"] = (
        f"{name}, driver {found['machine']['driver']}, torch {torch.__version__}, "
        f"copies {found.get('copy_tb_per_s', '-')} TB/s, unpacked in {found['unpacked_s']} s"
    )
    path.write_text(json.dumps(found, indent=1) + "\n")


def _nvidia_smi() -> list[str]:
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


if __name__ == "__main__":
    main()
