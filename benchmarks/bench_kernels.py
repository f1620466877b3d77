"""Every form of every steering operation by itself: time, floor, and share of the floor reached.

    python benchmarks/bench_kernels.py --json OUT [--grid full|short] [--quick] [--variants]
        [--only lm_steer,guidance,map,divergence,host] [--seconds N] ...

Sections: ``lm_steer`` the change of a batch's logits rows, ``guidance`` one layer's change of a
step's tokens, ``map`` which token takes what, ``divergence`` the KL of a dynamic strength, ``host``
the host's tables for ``lm_steer``. On a CUDA device the whole grid, by graph replay and by
launches; on a CPU the forms in plain torch on fewer rows. A form that cannot run a case has a line
with the reason instead of a time; one that fails has a line with the error, and the run then ends
with code 1.

``--grid short`` is for a few minutes on a card: our form for the device and a plain product beside
it. ``--variants`` adds LM-Steer in Triton with other block sizes than an engine takes. The file is
written anew after every line, so a run that is ended loses nothing; after ``--seconds`` no further
line is begun, and those left out say so.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import machine
import timing
import torch
from operations import divergence, guidance, lm_steer, routing, token_map
from operations.divergence import DivergenceCase
from operations.guidance import GuidanceCase, guidance_cases
from operations.lm_steer_cases import LMSteerCase, Shape, lm_steer_cases
from operations.lm_steer_forms import FORMS, VARIANTS
from operations.measure import NO_TIME, Bench
from operations.routing import routing_cases
from operations.token_map import MapCase

SECTIONS = ("lm_steer", "guidance", "map", "divergence", "host")
REACH = 4  # sets of inputs fill the last cache so many times


@dataclass(frozen=True)
class Grid:
    """Sizes of a run; ``special`` rows and ``shared`` tokens are those of the special cases, 0 or
    none where there are none. ``ours``: only our form for the device, and one plain product.
    """

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    distinct: tuple[int, ...]
    special: int
    width: int
    tokens: tuple[int, ...]
    doses: tuple[int, ...]
    shared: tuple[int, ...]
    decode: int
    prefill: int
    host_rows: tuple[int, ...]
    vocab: int
    probes: tuple[int, ...]
    repeats: int
    ours: bool = False

    def lm_steer_cases(self) -> list[LMSteerCase]:
        """Of every shape the grid of rows and distinct steers, and the special cases."""
        return list(lm_steer_cases(self.shapes, self.rows, self.distinct, self.special))

    def guidance_cases(self) -> list[GuidanceCase]:
        """Additions and rotations."""
        return list(guidance_cases(self.tokens, self.width, self.doses, self.shared))

    def map_cases(self) -> list[MapCase]:
        """A decode step of as many requests as tokens, and a prefill of eight requests."""
        steps = (("decode", self.decode, self.decode), ("prefill", self.prefill, 8))
        return [MapCase(*step, 32, k) for step in steps if step[1] for k in self.doses]

    def divergence_cases(self) -> list[DivergenceCase]:
        """Steps of so many dynamic doses."""
        return [DivergenceCase(doses, self.vocab) for doses in self.probes]

    def routing_cases(self) -> list[LMSteerCase]:
        """Batches for the host's part."""
        return list(routing_cases(self.host_rows, self.distinct))


PAPER, LOW_RANK, WIDE = Shape(1280, 1000), Shape(4096, 64), Shape(4096, 1000)
GPU = Grid(
    shapes=(PAPER, LOW_RANK, WIDE),
    rows=(1, 8, 64, 256, 1024),
    distinct=(1, 4, 32),
    special=256,
    width=4096,
    tokens=(1, 64, 256, 2048, 8192),
    doses=(1, 2, 4),
    shared=(256, 8192),
    decode=256,
    prefill=8192,
    host_rows=(64, 256, 1024),
    vocab=128256,
    probes=(1, 16, 64),
    repeats=20,
)
CPU = Grid(
    shapes=(PAPER, LOW_RANK, WIDE),
    rows=(1, 8, 64),
    distinct=(1, 4, 32),
    special=64,
    width=4096,
    tokens=(1, 64, 256),
    doses=(1, 4),
    shared=(256,),
    decode=256,
    prefill=2048,
    host_rows=(64, 256, 1024),
    vocab=128256,
    probes=(1, 16),
    repeats=7,
)
QUICK = Grid(
    shapes=(Shape(64, 16), Shape(64, 48)),
    rows=(1, 16),
    distinct=(1, 4),
    special=16,
    width=64,
    tokens=(1, 16),
    doses=(1, 2),
    shared=(16,),
    decode=16,
    prefill=256,
    host_rows=(64,),
    vocab=500,
    probes=(1, 4),
    repeats=3,
)
SHORT = Grid(
    shapes=(WIDE, LOW_RANK),
    rows=(1, 64, 256),
    distinct=(1, 4, 32),
    special=0,
    width=4096,
    tokens=(64, 8192),
    doses=(1,),
    shared=(),
    decode=256,
    prefill=0,
    host_rows=(),
    vocab=128256,
    probes=(1, 64),
    repeats=10,
    ours=True,
)
QUICK_SHORT = replace(
    SHORT,
    shapes=(Shape(64, 16),),
    rows=(1, 16),
    distinct=(1, 4),
    width=64,
    tokens=(16,),
    decode=16,
    vocab=500,
    probes=(1, 4),
    repeats=3,
)


def main() -> None:
    """Parse, measure, write after every line."""
    args = _arguments()
    until = monotonic() + args.seconds
    result = machine.describe_run("kernels")
    with torch.inference_mode():
        bench = _bench(args, until)
        result |= {
            "device": bench.device.type,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "bandwidth_gb_s": round(bench.bandwidth * 1e-9, 2),
            "matmul_tflops": round(bench.matmul * 1e-12, 3),
            "complete": False,
            "rows": [],
        }
        _write(args.json, result)
        for line in _lines(args, bench):
            result["rows"].append(line)
            _write(args.json, result)
    result["complete"] = True
    _write(args.json, result)
    if left := [_case(line) for line in result["rows"] if line.get("skipped") == NO_TIME]:
        print("left out, no time:", *left, sep="\n  ", file=sys.stderr)
    sys.exit(any("failed" in line for line in result["rows"]))


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: a run may be ended at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def _bench(args: argparse.Namespace, until: float) -> Bench:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    return Bench(
        device=device,
        dtype=dtype,
        repeats=args.repeats or _grid(args).repeats,
        reach=0 if args.quick else REACH * timing.cache_bytes(device),
        bandwidth=timing.copy_bandwidth(device),
        matmul=timing.matmul_rate(dtype, device),
        until=until,
    )


def _lines(args: argparse.Namespace, bench: Bench) -> Iterator[dict[str, Any]]:
    """Every line of the result; one with a time is shown as soon as it is there."""
    for line in _unseen_lines(args, bench):
        if "skipped" not in line:
            print(_words(line), file=sys.stderr, flush=True)
        yield line


def _unseen_lines(args: argparse.Namespace, bench: Bench) -> Iterator[dict[str, Any]]:
    grid, on_card = _grid(args), bench.device.type == "cuda"
    forms, layers, maps = FORMS, guidance.FORMS, token_map.FORMS
    if grid.ours:
        ours = ("triton_tiles", "triton_rows") if on_card else ("torch_groups",)
        forms = {name: FORMS[name] for name in (*ours, "addmm")}
        layers = maps = ("triton" if on_card else "torch",)
    kls = ("triton", "torch") if on_card else ("torch",)
    cases = grid.lm_steer_cases()
    sections = {
        "lm_steer": lambda: lm_steer.run(cases, bench, forms),
        "guidance": lambda: guidance.run(grid.guidance_cases(), bench, layers),
        "map": lambda: token_map.run(grid.map_cases(), bench, maps),
        "divergence": lambda: divergence.run(grid.divergence_cases(), bench, kls),
        "host": lambda: routing.run(grid.routing_cases(), bench),
    }
    for name in args.only:
        yield from sections[name]()
    if args.variants:
        yield from lm_steer.run(cases, bench, VARIANTS)


def _grid(args: argparse.Namespace) -> Grid:
    grid = GPU if torch.cuda.is_available() else CPU
    if args.grid == "short":
        grid = QUICK_SHORT if args.quick else SHORT
    elif args.quick:
        grid = QUICK
    return replace(grid, shapes=args.shapes) if args.shapes else grid


def _case(line: dict[str, Any]) -> str:
    """Which case and form a line is about."""
    inner = ("section", "case", "mode", "width", "rank", "rows", "distinct", "doses", "share")
    return " ".join([*(f"{key}={line[key]}" for key in inner if key in line), line["form"]])


def _words(line: dict[str, Any]) -> str:
    """A line of the result for the terminal."""
    if "failed" in line:
        return f"{_case(line)} failed: {line['failed']}"
    words = [f"{_case(line)}: {line['us']:.1f} us"]
    if "floor_us" in line:
        words.append(f"floor {line['floor_us']:.1f} us, {100 * line['share_of_floor']:.0f} % of it")
    if "host_us" in line:
        words.append(f"eager {line['eager_us']:.1f} us, host {line['host_us']:.1f} us")
    return ", ".join(words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="result file")
    parser.add_argument("--grid", choices=("full", "short"), default="full", help="which cases")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all")
    parser.add_argument(
        "--variants", action="store_true", help="LM-Steer in Triton with other block sizes too"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="N", help="begin no line after that"
    )
    parser.add_argument(
        "--only",
        type=_sections,
        default=list(SECTIONS),
        metavar="NAME,...",
        help=f"some of {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--shapes",
        type=lambda text: tuple(Shape.parse(part) for part in text.split(",")),
        metavar="WIDTHxRANK,...",
        help="shapes of the LM-Steers, as in 1280x1000,4096x64",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, metavar="N", help="samples per time")
    return parser.parse_args()


def _sections(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: some of {SECTIONS} are wanted")
    return names


if __name__ == "__main__":
    main()
