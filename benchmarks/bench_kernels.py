"""Every form of every steering operation by itself: time, floor, and share of the floor reached.

    python -m benchmarks.bench_kernels --json OUT [--grid full|short] [--quick] [--variants]
        [--seconds N]

Sections: ``lm_steer`` the change of a batch's rows, ``guidance`` one layer's change of a step's
tokens, ``map`` which token takes what, ``divergence`` the KL of a dynamic strength. On a CUDA
device by graph replay and by launches; on a CPU the forms in plain torch. A form that cannot run a
case has a line with the reason instead of a time; one that fails has a line with the error, and the
run then ends with code 1.

``--grid short`` is for a few minutes on a card: our form for the device and a plain product beside
it. ``--variants`` adds LM-Steer in Triton with other block sizes than an engine takes. After
``--seconds`` no further line is begun, and those left out say so.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from time import monotonic
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.operations import divergence, guidance, lm_steer, timing, token_map
from benchmarks.operations.divergence import DivergenceCase
from benchmarks.operations.guidance import GuidanceCase
from benchmarks.operations.lm_steer import LMSteerCase
from benchmarks.operations.measure import NO_TIME, Bench, Case, lines
from benchmarks.operations.token_map import MapCase
from benchmarks.result import Result

SECTIONS = ("lm_steer", "guidance", "map", "divergence")
REACH = 4  # sets of inputs fill the last cache so many times
Shape = tuple[int, int]  # width and rank


@dataclass(frozen=True)
class Grid:
    """Sizes of a run. ``ours``: only our form for the device, and one plain product."""

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    distinct: tuple[int, ...]
    width: int
    tokens: tuple[int, ...]
    doses: tuple[int, ...]
    decode: int
    prefill: int
    vocab: int
    probes: tuple[int, ...]
    repeats: int
    ours: bool = False

    def cases(self, section: str) -> list[Case]:
        """Of one section."""
        if section == "lm_steer":
            batches = {(rows, min(d, rows)) for rows, d in product(self.rows, self.distinct)}
            sizes = product(self.shapes, sorted(batches))
            return [LMSteerCase(*shape, *batch) for shape, batch in sizes]
        if section == "guidance":
            sizes = product(("add", "rotate"), self.tokens, (self.width,), self.doses)
            return [GuidanceCase(*size) for size in sizes]
        if section == "map":
            steps = (("decode", self.decode, self.decode), ("prefill", self.prefill, 8))
            return [MapCase(*step, 32, k) for step in steps if step[1] for k in self.doses]
        return [DivergenceCase(doses, self.vocab) for doses in self.probes]

    def forms(self, section: str, *, on_card: bool) -> tuple[str, ...]:
        """What is timed in a section."""
        return (OURS_ON_CARD if on_card else OURS)[section] if self.ours else FORMS[section]


FORMS = {
    "lm_steer": tuple(lm_steer.FORMS),
    "guidance": guidance.FORMS,
    "map": token_map.FORMS,
    "divergence": divergence.FORMS,
}
OURS = {
    "lm_steer": ("torch_groups", "addmm"),
    **dict.fromkeys(("guidance", "map", "divergence"), ("torch",)),
}
OURS_ON_CARD = {
    "lm_steer": ("triton_tiles", "triton_rows", "addmm"),
    **dict.fromkeys(("guidance", "map"), ("triton",)),
    "divergence": ("triton", "torch"),
}
PAPER, LOW_RANK, WIDE = (1280, 1000), (4096, 64), (4096, 1000)
FULL = Grid(
    shapes=(PAPER, LOW_RANK, WIDE),
    rows=(1, 8, 64),
    distinct=(1, 4, 32),
    width=4096,
    tokens=(1, 64, 256),
    doses=(1, 4),
    decode=256,
    prefill=2048,
    vocab=128256,
    probes=(1, 16),
    repeats=7,
)
SHORT = replace(
    FULL,
    shapes=(WIDE, LOW_RANK),
    rows=(1, 64, 256),
    tokens=(64, 8192),
    doses=(1,),
    prefill=0,
    probes=(1, 64),
    repeats=10,
    ours=True,
)
TINY: dict[str, Any] = {
    "shapes": ((64, 16), (64, 48)),
    "rows": (1, 16),
    "distinct": (1, 4),
    "width": 64,
    "tokens": (1, 16),
    "decode": 16,
    "prefill": 256,
    "vocab": 500,
    "probes": (1, 4),
    "repeats": 3,
}


def main() -> None:
    """Parse, measure, write after every line."""
    args = _arguments()
    result = Result("kernels", args.json)
    with torch.inference_mode():
        bench = _bench(args)
        result.write(
            device=bench.device.type,
            dtype="bfloat16",
            threads=torch.get_num_threads(),
            bandwidth_gb_s=round(bench.bandwidth * 1e-9, 2),
            matmul_tflops=round(bench.matmul * 1e-12, 3),
            complete=False,
        )
        for line in _lines(args, bench):
            result.add(line, None if "skipped" in line else _words(line))
    result.write(complete=True)
    rows = result.data["rows"]
    if left := [_case(line) for line in rows if line.get("skipped") == NO_TIME]:
        print("left out, no time:", *left, sep="\n  ", file=sys.stderr)
    sys.exit(any("failed" in line for line in rows))


def _bench(args: argparse.Namespace) -> Bench:
    until = monotonic() + args.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Bench(
        device=device,
        dtype=torch.bfloat16,
        repeats=_grid(args).repeats,
        reach=0 if args.quick else REACH * timing.cache_bytes(device),
        bandwidth=timing.copy_bandwidth(device),
        matmul=timing.matmul_rate(torch.bfloat16, device),
        until=until,
    )


def _lines(args: argparse.Namespace, bench: Bench) -> Iterator[dict[str, Any]]:
    grid, on_card = _grid(args), bench.device.type == "cuda"
    asked = [(section, grid.forms(section, on_card=on_card)) for section in SECTIONS]
    if args.variants:
        asked.append(("lm_steer", tuple(lm_steer.VARIANTS)))
    for section, forms in asked:
        for case in grid.cases(section):
            yield from lines(case, forms, bench)


def _grid(args: argparse.Namespace) -> Grid:
    grid = SHORT if args.grid == "short" else FULL
    return replace(grid, **TINY) if args.quick else grid


def _case(line: dict[str, Any]) -> str:
    """Which case and form a line is about."""
    inner = ("section", "case", "width", "rank", "rows", "distinct", "doses")
    return " ".join([*(f"{key}={line[key]}" for key in inner if key in line), line["form"]])


def _words(line: dict[str, Any]) -> str:
    """A line of the result for the terminal."""
    if "failed" in line:
        return f"{_case(line)} failed: {line['failed']}"
    floor = f"floor {line['floor_us']:.1f} us, {100 * line['share_of_floor']:.0f} % of it"
    words = [f"{_case(line)}: {line['us']:.1f} us", floor]
    if "host_us" in line:
        words.append(f"eager {line['eager_us']:.1f} us, host {line['host_us']:.1f} us")
    return ", ".join(words)


def _arguments() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--grid", choices=("full", "short"), default="full", help="which cases")
    add("--quick", action="store_true", help="tiny shapes: does it run at all")
    add("--variants", action="store_true", help="LM-Steer in Triton with other block sizes too")
    add("--seconds", type=float, default=math.inf, metavar="N", help="begin no line after that")
    return parser.parse_args()


if __name__ == "__main__":
    main()
