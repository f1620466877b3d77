"""Benchmark of every form of every steering operation: time, floor, and share of the floor reached.

    python -m benchmarks.bench_kernels --json OUT [--grid full|short] [--quick] [--variants]
        [--seconds N]

Sections: ``lm_steer`` the change of a batch's rows, ``guidance`` one layer's change of a step's
tokens, ``divergence`` the KL of a dynamic strength. On a CUDA device by graph replay; on a CPU the
forms in plain torch. A form that cannot run a case has a line with the reason instead of a time;
one that fails has a line with the error, and the run then ends with code 1.

``--grid short`` is for a few minutes on a card. ``--variants`` adds LM-Steer in Triton with other
block sizes than an engine takes. After ``--seconds`` no further case starts, and the result lists
the cases left out.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from time import monotonic
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.operations import divergence, guidance, lm_steer, timing
from benchmarks.operations.divergence import DivergenceCase
from benchmarks.operations.guidance import GuidanceCase
from benchmarks.operations.lm_steer import LMSteerCase
from benchmarks.operations.measure import MeasurementSetup, OperationCase, lines
from benchmarks.result import Result

REACH = 4  # how many times the sets of inputs fill the last-level cache
FORMS: dict[str, tuple[str, ...]] = {
    "lm_steer": tuple(lm_steer.FORMS),
    "guidance": guidance.FORMS,
    "divergence": divergence.FORMS,
}


@dataclass(frozen=True)
class Grid:
    """Sizes of a run: widths and ranks, rows and steers, tokens and their directions, doses."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    distinct: tuple[int, ...]
    width: int
    tokens: tuple[int, ...]
    directions: tuple[int, ...]
    vocab: int
    doses: tuple[int, ...]
    repeats: int

    def cases(self) -> Iterator[OperationCase]:
        """The cases of all sections."""
        batches = {(rows, min(d, rows)) for rows, d in product(self.rows, self.distinct)}
        for shape, batch in product(self.shapes, sorted(batches)):
            yield LMSteerCase(*shape, *batch)
        for mode, tokens, num_directions in product(
            ("add", "rotate"), self.tokens, self.directions
        ):
            yield GuidanceCase(mode, tokens, self.width, num_directions)
        for doses in self.doses:
            yield DivergenceCase(doses, self.vocab)


PAPER, LOW_RANK, WIDE = (1280, 1000), (4096, 64), (4096, 1000)
FULL = Grid(
    shapes=(PAPER, LOW_RANK, WIDE),
    rows=(1, 8, 64),
    distinct=(1, 4, 32),
    width=4096,
    tokens=(1, 64, 256),
    directions=(1, 4),
    vocab=128256,
    doses=(1, 16),
    repeats=7,
)
SHORT = replace(
    FULL,
    shapes=(WIDE, LOW_RANK),
    rows=(1, 64, 256),
    tokens=(64, 8192),
    directions=(1,),
    doses=(1, 64),
    repeats=10,
)
TINY: dict[str, Any] = {
    "shapes": ((64, 16), (64, 48)),
    "rows": (1, 16),
    "distinct": (1, 4),
    "width": 64,
    "tokens": (1, 16),
    "vocab": 500,
    "doses": (1, 4),
    "repeats": 3,
}


def main() -> None:
    """Parse, measure, write after every line."""
    args = _arguments()
    grid = SHORT if args.grid == "short" else FULL
    result = Result("kernels", args.json, left_out=[])
    with torch.inference_mode():
        measure(args, replace(grid, **TINY) if args.quick else grid, result)
    result.write()
    sys.exit(any("failed" in line for line in result.data["rows"]))


def measure(args: argparse.Namespace, grid: Grid, result: Result) -> None:
    """Add a line per case and form to ``result``."""
    until, bench = monotonic() + args.seconds, _bench(grid, quick=args.quick)
    result.write(
        device=bench.device.type,
        dtype="bfloat16",
        threads=torch.get_num_threads(),
        bandwidth_gb_s=round(bench.bandwidth * 1e-9, 2),
        matmul_tflops=round(bench.matmul * 1e-12, 3),
    )
    for case in grid.cases():
        if monotonic() >= until:
            result.data["left_out"].append(case.columns)
            continue
        forms = FORMS[case.section]
        if args.variants and case.section == "lm_steer":
            forms += tuple(lm_steer.VARIANTS)
        for line in lines(case, forms, bench):
            result.add(line, None if "skipped" in line else _words(line))


def _bench(grid: Grid, *, quick: bool) -> MeasurementSetup:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return MeasurementSetup(
        device=device,
        dtype=torch.bfloat16,
        repeats=grid.repeats,
        reach=0 if quick else REACH * timing.cache_bytes(device),
        bandwidth=timing.copy_bandwidth(device),
        matmul=timing.matmul_rate(torch.bfloat16, device),
    )


def _words(line: dict[str, Any]) -> str:
    """A line of the result for the terminal."""
    inner = ("section", "case", "width", "rank", "rows", "distinct", "doses")
    case = " ".join([*(f"{key}={line[key]}" for key in inner if key in line), line["form"]])
    if "failed" in line:
        return f"{case} failed: {line['failed']}"
    floor = f"floor {line['floor_us']:.1f} us, {100 * line['share_of_floor']:.0f} % of it"
    host = f", host {line['host_us']:.1f} us" if "host_us" in line else ""
    return f"{case}: {line['us']:.1f} us, {floor}{host}"


def _arguments() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--grid", choices=("full", "short"), default="full", help="which cases")
    add("--quick", action="store_true", help="tiny shapes: does it run at all")
    add("--variants", action="store_true", help="LM-Steer in Triton with other block sizes too")
    arguments.add_seconds(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
