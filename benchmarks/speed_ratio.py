"""Engine decode-step time, steered over unsteered, on dummy weights, in one process and run.

    python benchmarks/speed_ratio.py --json OUT [--shape gpt2-medium] [--rank 1000] ...

Engines of one configuration live in this process, as many as the figures need:

    bare      made before the plugin is registered: stock vLLM
    unused    made after it, without a steer config
    steered   made with a steer config that loads ``max(--distinct)`` LM-Steers
    guided    made with one vector steer that is added to the residual stream of every layer
    rotated   made with one concept that the residual stream of every layer is rotated to

and these figures come out, each from interleaved legs (``rounds.py``; ``decode.py`` says why a
step's time is the median of steps timed one by one):

    steered   every row LM-steered over no row steered, both on ``steered``
    guided    every row guided, each at a strength of its own, over no row guided, on ``guided``
    rotated   the same on ``rotated``
    unused    ``unused`` over ``bare``
    loaded    unsteered requests on ``steered`` over the same on ``bare``
    idle      unsteered requests on ``guided`` over the same on ``bare``

Figures come in the order asked for. Where one that needs the plugin comes first, ``bare`` is an
engine with the plugin registered and no config, in which none of its code runs in a step.
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

from benchmarks import arguments, environment, floors
from benchmarks.decode import (
    LEAD_STEPS,
    PROMPT_TOKENS,
    Engine,
    Leg,
    compare,
    profile_steps,
    step_columns,
)
from benchmarks.dummy_model import (
    SHAPES,
    STRENGTH,
    steer_config,
    write_model,
    write_steers,
    write_vectors,
)
from benchmarks.engines import make_engine
from benchmarks.equality import check_engine, check_legs, check_operation
from benchmarks.result import Result
from benchmarks.rounds import Round

FIGURES = ("unused", "loaded", "steered", "idle", "guided", "rotated")
STEERING = ("steered", "guided", "rotated")
ENGINES = {  # of each figure's A legs and B legs
    "unused": ("bare", "unused"),
    "loaded": ("bare", "steered"),
    "idle": ("bare", "guided"),
    **{name: (name, name) for name in STEERING},
}


@dataclass(frozen=True)
class Case:
    """One line of the result: a figure, a batch size, and how many steers, or for guidance how many
    strengths, its rows share."""

    name: str
    rows: int
    distinct: int

    @property
    def steers(self) -> list[str | None]:
        """Each row's steer in the B legs; rows take the steers in turn."""
        if self.name == "steered":
            return [f"s{row % self.distinct}:{STRENGTH}" for row in range(self.rows)]
        if self.name in STEERING:
            strengths = [STRENGTH + (row % self.distinct) / 8 for row in range(self.rows)]
            return [f"{self.name}:{strength}" for strength in strengths]
        return [None] * self.rows


def main() -> None:
    """Parse, measure, write, print."""
    environment.set_defaults()
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
    bench = Bench(args, folder, steers=steers)
    for case in cases:
        if time.monotonic() - begun > args.seconds:
            result.data["left_out"].append(vars(case))
            continue
        line = bench.line(case, bench.checked_rounds(case))
        if args.profile and case.name in STEERING:
            line["profile"] = bench.profile(case)
        dtype = str(bench.dtype).removeprefix("torch.")
        result.data |= {"dtype": dtype, "threads": torch.get_num_threads()}
        ratio = "{ratio_median:.3f} ({ratio_p20:.3f} to {ratio_p80:.3f})".format(**line)
        result.add(line, f"{case.name}, {case.rows} rows, {case.distinct} distinct: {ratio}")
    result.write()


class Bench:
    """A model, its steers, and the engines, each made when it is first needed."""

    def __init__(self, args: argparse.Namespace, folder: Path, *, steers: int) -> None:
        self._args = args
        self.shape = SHAPES[args.shape]
        self._model = write_model(self.shape, folder / "model")
        paths = write_steers(self.shape, folder / "steers", count=steers, rank=args.rank)
        self._configs = {"steered": steer_config(paths, args.rank)}
        for name, path in write_vectors(self.shape, folder / "steers").items():
            self._configs[name] = steer_config({name: path}, rank=1)
        self._engines: dict[str, Engine] = {}

    def engine(self, name: str) -> Engine:
        """An engine by its name in the module's docstring."""
        if name not in self._engines:
            options: dict[str, Any] = {}
            if self._args.capture_sizes:
                sizes = {"cudagraph_capture_sizes": self._args.capture_sizes}
                options["compilation_config"] = sizes
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
            self._engines[name] = Engine(llm)
        return self._engines[name]

    @property
    def dtype(self) -> torch.dtype:
        """What vLLM settled on, of any engine made so far."""
        engine = next(iter(self._engines.values()), None) or self.engine("bare")
        return engine.llm.llm_engine.vllm_config.model_config.dtype

    @property
    def max_rows(self) -> int:
        """The largest batch that the engines take."""
        return max(self._args.rows + [rows for rows, _ in self._args.cases or ()])

    def checked_rounds(self, case: Case) -> list[Round[Leg]]:
        """Equal first, then timed, then seen to have been steered."""
        steering = case.name in STEERING
        if steering:
            engine = self.engine(case.name)
            size = {"rank": self._args.rank, "rows": self.max_rows}
            check_operation(case.name, self.shape, self.dtype, **size)
            half = [steer if row % 2 == 0 else None for row, steer in enumerate(case.steers)]
            check_engine(engine, half, self.shape)
        plain, other = (self.engine(name) for name in ENGINES[case.name])
        asked = (plain, [None] * case.rows), (other, case.steers)
        rounds = compare(*asked, self._args.steps, self.shape.vocab_size, self._args.repeats)
        check_legs(rounds, steered=steering)
        if steering:
            check_engine(engine, case.steers, self.shape)
        return rounds

    def profile(self, case: Case) -> list[dict[str, Any]]:
        """What the device did in some steps of a case's B legs, the longest first."""
        engine = self.engine(ENGINES[case.name][1])
        return profile_steps(engine, case.steers, self._args.profile, self.shape.vocab_size)

    def line(self, case: Case, rounds: list[Round[Leg]]) -> dict[str, Any]:
        """The columns of a case."""
        shape, rank = self.shape, self._args.rank if case.name == "steered" else 0
        size = {"rows": case.rows, "itemsize": self.dtype.itemsize}
        floor, flops = 0, 0
        if case.name == "steered":
            width = shape.hidden_size
            floor = floors.lm_steer_bytes(width, distinct=case.distinct, rank=rank, **size)
            flops = 4 * case.rows * width * rank
        elif case.name in STEERING:
            floor = floors.guided_step_bytes(shape, **size)
            per_number = 2 if case.name == "guided" else 9
            flops = per_number * shape.layers * case.rows * shape.hidden_size
        context = PROMPT_TOKENS + LEAD_STEPS + self._args.steps // 2
        step = floors.step_bytes(shape, context=context, **size)
        return {
            "name": case.name,
            "rows": case.rows,
            "distinct": case.distinct,
            "rank": rank,
            **step_columns(rounds),
            "floor_bytes": floor,
            "flops": flops,
            "predicted_ratio": round(1 + floor / step, 4),
        }


def _cases(figure: str, args: argparse.Namespace) -> Iterator[Case]:
    if figure == "steered" and args.cases:
        yield from (Case(figure, rows, distinct) for rows, distinct in args.cases)
        return
    for rows in args.rows:
        shared = [rows] if figure in STEERING else [0]
        if figure == "steered":
            shared = sorted({min(distinct, rows) for distinct in args.distinct})
        yield from (Case(figure, rows, distinct) for distinct in shared)


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
    add(
        "--figures",
        type=arguments.some_of(FIGURES),
        default=list(FIGURES),
        metavar="NAME,...",
        help=f"some of {', '.join(FIGURES)}, in the order to measure them in",
    )
    add(
        "--cases",
        type=_pairs,
        metavar="ROWS:STEERS,...",
        help="of the figure steered: these and not every --rows with every --distinct",
    )
    add("--capture-sizes", **counts, help="of the engines' CUDA graphs; default: vLLM's own")
    add("--gpu-memory", type=float, default=0.25, metavar="SHARE", help="of the card, per engine")
    add("--profile", type=int, default=0, metavar="N", help="profile N steps of each steered case")
    add(
        "--seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="begin no case later than this; what is left out stands in the result",
    )
    add("--quick", action="store_true", help="few rounds: does it run at all")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.distinct, args.repeats, args.steps = [1, 4], [1, 4], 2, 4
    return args


def _pairs(text: str) -> list[tuple[int, int]]:
    pairs = []
    for part in text.split(","):
        rows, _, distinct = part.partition(":")
        if not (rows.isdecimal() and distinct.isdecimal() and 1 <= int(distinct) <= int(rows)):
            raise argparse.ArgumentTypeError(
                f"{part!r}: rows and a number of steers that is no larger, as in 64:4"
            )
        pairs.append((int(rows), int(distinct)))
    return pairs


if __name__ == "__main__":
    main()
