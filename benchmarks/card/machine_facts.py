"""The machine, its GPU and its software; unpacks vLLM if the pack has it.

python -m benchmarks.card.machine_facts PACK SCRATCH --json OUT
"""

import subprocess
import tarfile
import time
from pathlib import Path

from benchmarks import arguments


def main() -> None:
    """Unpack vLLM, describe the machine, write the result."""
    parser = arguments.parser(__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("scratch", type=Path)
    args = parser.parse_args()
    begun, piece = time.monotonic(), args.pack / "vllm.tar.xz"
    if piece.exists():
        with tarfile.open(piece) as archive:
            archive.extractall(args.scratch / "vllm", filter="data")
    unpacked_s = round(time.monotonic() - begun, 1)
    # Packages of the archive can be imported only now.
    import torch

    from benchmarks.operations.timing import copy_bandwidth
    from benchmarks.result import Result

    result = Result("card", args.json, unpacked_s=unpacked_s, cards=_nvidia_smi())
    copies = None
    if torch.cuda.is_available():
        copies = round(copy_bandwidth(torch.device("cuda")) * 1e-12, 2)
    machine = result.data["machine"]
    name = machine["gpu"] or "no card"
    summary = (
        f"{name}, driver {machine['driver']}, torch {torch.__version__}, "
        f"copies {copies or '-'} TB/s, unpacked in {unpacked_s} s"
    )
    result.write(copy_tb_per_s=copies, summary=summary)


def _nvidia_smi() -> list[str]:
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return process.stdout.strip().splitlines()


if __name__ == "__main__":
    main()
