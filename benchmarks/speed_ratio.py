"""Engine decode-step time, steered over unsteered, on dummy weights, in one process and run.

    python benchmarks/speed_ratio.py --json OUT [--shape gpt2-medium] [--rank 1000] ...

Engines of one configuration live in this process, as many as the figures need:

    bare      made before the plugin is registered: stock vLLM
    unused    made after it, without a steer config
    steered   made with a steer config that loads as many LM-Steers as a batch has
    guided    made with one vector steer that is added to the residual stream of every layer
    rotated   made with one concept that the residual stream of every layer is rotated to

A figure is the step time of one batch on one engine over that of another (``FIGURES``), from
interleaved legs (``rounds.py``; ``decode.py`` says why a step's time is the median of steps timed
one by one). Figures are measured in the requested order. If one that needs the plugin comes first,
``bare`` is an engine with the plugin registered and without a config, which runs none of its code
in a step.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script in any working directory

from benchmarks import arguments
from benchmarks import dummy_model as dummy
from benchmarks.decode import (
    LEAD_STEPS,
    PROMPT_TOKENS,
    BenchmarkEngine,
    DecodeLeg,
    compare,
    profile_steps,
    step_columns,
)
from benchmarks.dummy_model import SHAPES, STRENGTH, steer_config
from benchmarks.engines import make_engine, set_environment
from benchmarks.equality import check_engine, check_legs, check_operation
from benchmarks.result import Result
from benchmarks.rounds import Round

FIGURES = {  # the engines of the A and B legs of each figure; no row of an A leg is steered
    "unused": ("bare", "unused"),
    "loaded": ("bare", "steered"),
    "steered": ("steered", "steered"),
    "idle": ("bare", "guided"),
    "guided": ("guided", "guided"),
    "rotated": ("rotated", "rotated"),
}
STEERING = ("steered", "guided", "rotated")  # figures whose B legs have every row steered


@dataclass(frozen=True)
class SpeedCase:
    """One line of the result: a figure, a batch size, and the number of steers (for guidance: of
    strengths) that its rows share."""

    name: str
    rows: int
    distinct: int

    @property
    def steers(self) -> list[str | None]:
        """Each row's steer in the B legs; rows take the steers round-robin."""
        if self.name == "steered":
            return [f"s{row % self.distinct}:{STRENGTH}" for row in range(self.rows)]
        if self.name in STEERING:
            strengths = [STRENGTH + (row % self.distinct) / 8 for row in range(self.rows)]
            return [f"{self.name}:{strength}" for strength in strengths]
        return [None] * self.rows


def main() -> None:
    """Parse, measure, write, print."""
    set_environment()
    args = _arguments()
    result = Result(
        "speed_ratio",
        args.json,
        shape=args.shape,
        prompt_tokens=PROMPT_TOKENS,
        steps_per_leg=args.steps,
        left_out=[],
    )
    with tempfile.TemporaryDirectory(prefix="speed-ratio-") as folder:
        measure(args, Path(folder), result)
    result.show()


def measure(args: argparse.Namespace, folder: Path, result: Result) -> None:
    """Add one line per case to ``result``."""
    begun = time.monotonic()
    cases = [case for figure in args.figures for case in _cases(figure, args)]
    steers = max((case.distinct for case in cases if case.name == "steered"), default=1)
    bench = SpeedRatioBench(args, folder, steers=steers)
    for case in cases:
        if time.monotonic() - begun > args.seconds:
            result.data["left_out"].append(vars(case))
            continue
        line = bench.line(case, bench.checked_rounds(case))
        if args.profile and case.name in STEERING:
            profiled = (bench.engine(case.name), case.steers)
            line["profile"] = profile_steps(*profiled, args.profile, bench.shape.vocab_size)
        result.data["dtype"] = str(bench.dtype).removeprefix("torch.")
        ratio = "{ratio_median:.3f} ({ratio_p20:.3f} to {ratio_p80:.3f})".format(**line)
        result.add(line, f"{case.name}, {case.rows} rows, {case.distinct} distinct: {ratio}")
    result.write(threads=torch.get_num_threads())


class SpeedRatioBench:
    """A model, its steers, and the engines, each made when it is first needed."""

    def __init__(self, args: argparse.Namespace, folder: Path, *, steers: int) -> None:
        self._args = args
        self.shape = SHAPES[args.shape]
        self._model = dummy.write_model(self.shape, folder / "model")
        paths = dummy.write_steers(self.shape, folder / "steers", count=steers, rank=args.rank)
        self._configs = {"steered": steer_config(paths, args.rank)}
        for name, path in dummy.write_vectors(self.shape, folder / "steers").items():
            self._configs[name] = steer_config({name: path}, rank=1)
        self._engines: dict[str, BenchmarkEngine] = {}

    def engine(self, name: str) -> BenchmarkEngine:
        """An engine by its name in the module's docstring."""
        if name not in self._engines:
            sizes, options = self._args.capture_sizes, {}
            if sizes:
                options["compilation_config"] = {"cudagraph_capture_sizes": sizes}
            llm = make_engine(
                self._model,
                self._configs.get(name),
                plugin=name != "bare",
                gpu_memory=self._args.gpu_memory,
                load_format="dummy",
                dtype=self._args.dtype,
                max_num_seqs=self.max_rows,
                **options,
            )
            self._engines[name] = BenchmarkEngine(llm)
        return self._engines[name]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that vLLM selected, from any engine made so far."""
        engine = next(iter(self._engines.values()), None) or self.engine("bare")
        return engine.llm.llm_engine.vllm_config.model_config.dtype

    @property
    def max_rows(self) -> int:
        """The largest batch of the engines."""
        return max(self._args.rows + [rows for rows, _ in self._args.cases or ()])

    def checked_rounds(self, case: SpeedCase) -> list[Round[DecodeLeg]]:
        """Check equality, measure, then check that the rows were steered."""
        steering = case.name in STEERING
        if steering:
            engine = self.engine(case.name)
            size = {"rank": self._args.rank, "rows": self.max_rows}
            check_operation(case.name, self.shape, self.dtype, **size)
            half = [steer if row % 2 == 0 else None for row, steer in enumerate(case.steers)]
            check_engine(engine, half, self.shape)
        plain, other = (self.engine(name) for name in FIGURES[case.name])
        sides = (plain, [None] * case.rows), (other, case.steers)
        rounds = compare(*sides, self._args.steps, self.shape.vocab_size, self._args.repeats)
        check_legs(rounds, steered=steering)
        if steering:
            check_engine(engine, case.steers, self.shape)
        return rounds

    def line(self, case: SpeedCase, rounds: list[Round[DecodeLeg]]) -> dict[str, Any]:
        """The columns of a case."""
        rank = self._args.rank if case.name == "steered" else 0
        context = PROMPT_TOKENS + LEAD_STEPS + self._args.steps // 2
        size = {"rows": case.rows, "itemsize": self.dtype.itemsize}
        step = dummy.step_bytes(self.shape, context=context, **size)
        floor, flops, width = 0, 0, self.shape.hidden_size
        if case.name == "steered":
            floor = dummy.lm_steer_bytes(width, distinct=case.distinct, rank=rank, **size)
            flops = 4 * case.rows * width * rank
        elif case.name in STEERING:
            floor = dummy.guided_step_bytes(self.shape, **size)
            flops = (2 if case.name == "guided" else 9) * self.shape.layers * case.rows * width
        predicted = {
            "floor_bytes": floor,
            "flops": flops,
        }
        predicted["predicted_ratio"] = round(1 + floor / step, 4)
        return {**vars(case), "rank": rank, **step_columns(rounds), **predicted}


def _cases(figure: str, args: argparse.Namespace) -> Iterator[SpeedCase]:
    if figure == "steered" and args.cases:
        yield from (SpeedCase(figure, rows, distinct) for rows, distinct in args.cases)
        return
    for rows in args.rows:
        shared = [rows] if figure in STEERING else [0]
        if figure == "steered":
            shared = sorted({min(distinct, rows) for distinct in args.distinct})
        yield from (SpeedCase(figure, rows, distinct) for distinct in shared)


def _arguments() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add, counts = parser.add_argument, {"type": arguments.numbers, "metavar": "N,N,..."}
    add("--shape", choices=SHAPES, default="gpt2-medium")
    add("--rank", type=int, default=1000)
    add("--rows", default=[1, 4, 8, 32], **counts)
    add("--distinct", default=[1, 4, 32], **counts)
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--repeats", type=int, default=11, metavar="N", help="rounds per case")
    add("--steps", type=int, default=24, metavar="N", help="timed steps per leg")
    arguments.add_names(parser, "--figures", FIGURES)
    help_text = "of the figure steered: these and not every --rows with every --distinct"
    add("--cases", type=_pairs, metavar="ROWS:STEERS,...", help=help_text)
    add("--capture-sizes", **counts, help="of the engines' CUDA graphs; default: vLLM's own")
    add("--gpu-memory", type=float, default=0.25, metavar="SHARE", help="of the card, per engine")
    add("--profile", type=int, default=0, metavar="N", help="profile N steps of each steered case")
    arguments.add_seconds(parser)
    add("--quick", action="store_true", help="few rounds: does it run at all")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.distinct, args.repeats, args.steps = [1, 4], [1, 4], 2, 4
    return args


def _pairs(text: str) -> list[tuple[int, int]]:
    pairs = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    if not all(len(pair) == 2 and 1 <= pair[1] <= pair[0] for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r}: rows and a number of steers that is no larger, as in 64:4"
        )
    return pairs


if __name__ == "__main__":
    main()
