"""Benchmark of decode steps: vllm-steer and its alternatives.

    python -m benchmarks.bench_peers --json OUT [--shape gpt2-medium] [--rows 1,8,32] [--only ...]

Every peer (see ``peers/``) decodes the same batch on the same random checkpoint, in a process of
its own, with interleaved legs. For each batch size its own steered step is compared with its own
unsteered step, and with the steered step of vllm-steer in the same process. vLLM's LoRA does not
support GPT-2, so LoRA and its vllm-steer run use a Llama of the same size. If LoRA cannot run here,
its line has ``skipped`` with the reason, and no figure.
"""

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.decode import PROMPT_TOKENS
from benchmarks.dummy_model import SHAPES, write_checkpoint, write_steers, write_vectors
from benchmarks.engines import set_environment
from benchmarks.peers.job import PeerJob
from benchmarks.processes import in_own_process
from benchmarks.result import Result

MODULES = {"hf-lm-steer": "hf_lm_steer", "hooks-eager": "hooks_eager", "lora-r64": "lora"}
LORA = "lora-r64"
Line = dict[str, Any]


def main() -> None:
    """Parse, measure, write, print."""
    set_environment()
    args = _arguments()
    result = Result(
        "peers",
        args.json,
        shape=args.shape,
        dtype=args.dtype,
        prompt_tokens=PROMPT_TOKENS,
        steps_per_leg=args.steps,
    )
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for peer in args.only:
            lines, threads = measure(peer, args, Path(folder))
            result.data["threads"] = threads or result.data.get("threads")
            for line in lines:
                message = line.get("skipped") or f"{line['rows']} rows: {line['ratio_median']}"
                result.add(line, f"{line['name']}, {message}")
    result.show()


def measure(peer: str, args: argparse.Namespace, folder: Path) -> tuple[list[Line], int | None]:
    """The lines of one peer, and the number of threads that vLLM set for torch."""
    shape = f"{args.shape}-as-llama" if peer == LORA else args.shape
    model, steers, sizes = folder / shape / "model", folder / shape / "steers", SHAPES[shape]
    if not model.exists():
        write_checkpoint(sizes, model, getattr(torch, args.dtype))
        write_steers(sizes, steers, count=1, rank=args.rank)
        write_vectors(sizes, steers)
    options = {key: getattr(args, key) for key in ("dtype", "rank", "rows", "repeats", "steps")}
    try:
        return in_own_process(run, PeerJob(peer, shape, model, steers, **options))
    except Exception as error:
        if peer != LORA:  # third-party code that may not support this machine
            raise
        return [{"name": peer, "shape": shape, "skipped": f"it failed: {error}"}], None


def run(job: PeerJob) -> tuple[list[Line], int]:
    """Measure a peer in this process."""
    module = importlib.import_module(f"benchmarks.peers.{MODULES[job.peer]}")
    return module.measure(job), torch.get_num_threads()


def _arguments() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=("tiny", "gpt2-medium"), default="gpt2-medium")
    add("--rank", type=int, default=1000, help="of LM-Steers")
    add("--rows", type=arguments.numbers, default=[1, 8, 32], metavar="N,N,...")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--repeats", type=int, default=9, metavar="N", help="rounds per case")
    add("--steps", type=int, default=24, metavar="N", help="timed steps per leg")
    arguments.add_names(parser, "--only", MODULES)
    add("--quick", action="store_true", help="few rounds: does it run at all")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeats, args.steps = [1, 4], 2, 4
    return args


if __name__ == "__main__":
    main()
