"""What a user would run instead: decode steps of vllm-steer and of its alternatives.

    python benchmarks/bench_peers.py --json OUT [--shape gpt2-medium] [--rows 1,8,32] [--only ...]

Every peer (see ``peers/``) decodes the same batch on the same random checkpoint, in a process of
its own, with legs interleaved A / B / A (see ``decode.py``). For each batch size its own steered
step is compared with its own unsteered step, and, where vllm-steer runs in the same process, with
the steered step of vllm-steer. LoRA and hotwire-vllm know no GPT-2: they and vllm-steer beside them
get a Llama of the same size.

Peers from PyPI are looked for in the interpreters given with ``--python-hotwire`` and
``--python-lens`` (default: this one). One that cannot run here gets a line ``skipped`` with the
reason, and no figure; these two have not been run so far.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)

import machine  # noqa: E402
import torch  # noqa: E402
from decode import PROMPT_TOKENS  # noqa: E402
from dummy_model import SHAPES  # noqa: E402
from peers.checkpoint import (  # noqa: E402
    llama_name,
    shape_named,
    write_all_steers,
    write_checkpoint,
)
from peers.columns import HEADINGS, cells, reasons  # noqa: E402
from peers.interpreters import PACKAGES, reason_against  # noqa: E402
from peers.job import Job  # noqa: E402
from peers.lines import skipped_line  # noqa: E402
from peers.run import MODULES  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from table import title  # noqa: E402

ON_A_LLAMA = ("lora-r64", "hotwire-vllm")
MAY_FAIL = ("lora-r64", *PACKAGES)  # other people's code, on a machine that it may not support


def main() -> None:
    """Parse, measure, write, print."""
    args = _arguments()
    console = Console(stderr=True)
    result = describe_run(args)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        bench = Bench(args, Path(folder))
        for peer in args.only:
            console.print(f"{peer} ...")
            found = bench.run(peer)
            result["threads"] = found.get("threads") or result["threads"]
            result["rows"] += found["rows"]
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(rich_table(result), *reasons(result), sep="\n")


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about the run that is known before it."""
    return {
        **machine.describe_run("peers"),
        "shape": args.shape,
        "dtype": args.dtype,
        "prompt_tokens": PROMPT_TOKENS,
        "steps_per_leg": args.steps,
        "threads": torch.get_num_threads(),
        "rows": [],
    }


def rich_table(result: dict[str, Any]) -> Table:
    """A result for the terminal."""
    table = Table(*HEADINGS, title=title(result))
    for line in result["rows"]:
        table.add_row(*cells(line))
    return table


class Bench:
    """Runs peers one after the other; checkpoints are written when they are first needed."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder

    def run(self, peer: str) -> dict[str, Any]:
        """The lines of one peer: its figures, or why there are none."""
        args = self._args
        shape = llama_name(args.shape) if peer in ON_A_LLAMA else args.shape
        interpreter = {"hotwire-vllm": args.python_hotwire, "vllm-lens": args.python_lens}.get(peer)
        if interpreter and (reason := reason_against(peer, interpreter)):
            return {"rows": [skipped_line(peer, shape, reason)]}
        out = self._folder / f"{peer}.out.json"
        error = self._call(interpreter or sys.executable, self._job(peer, shape), out)
        if not error:
            return json.loads(out.read_text())
        if peer not in MAY_FAIL:
            raise SystemExit(f"{peer} failed:\n{error}")
        return {"rows": [skipped_line(peer, shape, f"it failed: {error.splitlines()[-1]}")]}

    def _job(self, peer: str, shape: str) -> Path:
        args = self._args
        model, steers = self._folder / shape / "model", self._folder / shape / "steers"
        if not model.exists():
            write_checkpoint(shape_named(shape), model, getattr(torch, args.dtype))
            write_all_steers(shape_named(shape), steers, args.rank)
        given = {key: getattr(args, key) for key in ("dtype", "rank", "repeats", "steps")}
        job = Job(
            peer=peer, shape=shape, model=str(model), steers=str(steers), rows=args.rows, **given
        )
        return job.write(self._folder / f"{peer}.json")

    def _call(self, interpreter: str, job: Path, out: Path) -> str | None:
        """What the process wrote to stderr if it failed."""
        done = subprocess.run(
            [interpreter, "-m", "peers.run", str(job), str(out)],
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        return done.stderr.strip()[-4000:] or "no message" if done.returncode else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="result file")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-medium")
    parser.add_argument("--rank", type=int, default=1000, help="of LM-Steers")
    parser.add_argument("--rows", type=_numbers, default=(1, 8, 32), metavar="N,N,...")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds per case")
    parser.add_argument("--steps", type=int, default=24, metavar="N", help="timed steps per leg")
    parser.add_argument(
        "--only",
        type=_peers,
        default=list(MODULES),
        metavar="NAME,...",
        help=f"some of {', '.join(MODULES)}",
    )
    for option, peer in (("--python-hotwire", "hotwire-vllm"), ("--python-lens", "vllm-lens")):
        parser.add_argument(
            option, default=sys.executable, metavar="PATH", help=f"interpreter that has {peer}"
        )
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeats, args.steps = (1, 4), 2, 4
    return args


def _numbers(text: str) -> tuple[int, ...]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 are wanted, as in 1,4,32")
    return tuple(numbers)


def _peers(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(MODULES))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; peers: {[*MODULES]}")
    return [name for name in MODULES if name in names]


if __name__ == "__main__":
    main()
