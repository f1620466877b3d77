"""Engine decode-step time, steered over unsteered, on dummy weights, in one process and run.

    python benchmarks/speed_ratio.py --json OUT [--shape gpt2-medium] [--rank 1000] ...

Engines of one configuration live in this process, as many as the figures need:

    bare      made before the plugin is registered: stock vLLM
    unused    made after it, without a steer config
    steered   made with a steer config that loads ``max(--distinct)`` LM-Steers
    guided    made with one vector steer that is added to the residual stream of every layer
    rotated   made with one concept that the residual stream of every layer is rotated to

and these figures come out, each from legs interleaved A / B / A (see ``decode.py``, which says why
a step's time is the median of steps timed one by one):

    steered   every row LM-steered over no row steered, both on ``steered``
    guided    every row guided, each at a strength of its own, over no row guided, on ``guided``
    rotated   the same on ``rotated``
    unused    ``unused`` over ``bare``
    loaded    unsteered requests on ``steered`` over the same on ``bare``
    idle      unsteered requests on ``guided`` over the same on ``bare``

Figures come in the order asked for. Where one that needs the plugin comes first, ``bare`` is an
engine with the plugin registered and no config, in which none of its code runs in a step.

The result is written after every case, so that a run which is ended early keeps what it has.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from decode import (  # noqa: E402
    LEAD_STEPS,
    PROMPT_TOKENS,
    Comparison,
    compare,
    profile_steps,
    run_leg,
)
from dummy_model import (  # noqa: E402
    SHAPES,
    STRENGTH,
    Shape,
    guidance_bytes,
    steer_bytes,
    steer_config,
    step_bytes,
    write_model,
    write_steers,
    write_vectors,
)
from equality import (  # noqa: E402
    check_engine,
    check_guidance,
    check_legs,
    check_operation,
)
from rich.console import Console  # noqa: E402
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn  # noqa: E402
from table import rich_table  # noqa: E402

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
    args = _arguments()
    console = Console(stderr=True)
    result = describe_run(args) | {"rows": [], "left_out": []}
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="speed-ratio-") as folder:
        measure(args, Path(folder), console, result, write)
    Console().print(rich_table(result))


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about the run that is known before it."""
    return {
        **machine.describe_run("speed_ratio"),
        "shape": args.shape,
        "prompt_tokens": PROMPT_TOKENS,
        "steps_per_leg": args.steps,
    }


def measure(
    args: argparse.Namespace,
    folder: Path,
    console: Console,
    result: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Add one line per case to ``result``, and write it after each."""
    begun = time.monotonic()
    shape = SHAPES[args.shape]
    cases = [case for figure in args.figures for case in _cases(figure, args)]
    count = max([case.distinct for case in cases if case.name == "steered"], default=1)
    paths = write_steers(shape, folder / "steers", count=count, rank=args.rank)
    vectors = write_vectors(shape, folder / "steers")
    configs = {"steered": steer_config(paths, args.rank)}
    configs |= {name: steer_config({name: path}, rank=1) for name, path in vectors.items()}
    bench = Bench(args, shape, write_model(shape, folder / "model"), configs)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=2 * args.repeats * len(cases))
        for case in cases:
            if time.monotonic() - begun > args.seconds:
                result["left_out"].append(vars(case))
                continue
            progress.update(task, description=f"{case.name} {case.rows} rows, {case.distinct}")
            comparison = _checked_run(bench, case, paths | vectors, partial(progress.advance, task))
            line = _line(case, comparison, args, bench.dtype)
            if args.profile and case.name in STEERING:
                line["profile"] = bench.profile(case, args.profile)
            result["rows"].append(line)
            result.update(
                dtype=str(bench.dtype).removeprefix("torch."), threads=torch.get_num_threads()
            )
            write()
            progress.console.print(f"{case.name} {case.rows} {case.distinct}", line)
    write()


def _checked_run(bench: "Bench", case: Case, paths: dict[str, Path], tick: Any) -> Comparison:
    """Equal first, then timed, then seen to have been steered."""
    if case.name not in STEERING:
        comparison = bench.run(case, tick)
        check_legs(comparison, steered=False)
        return comparison
    engine, shape = bench.engine(case.name), bench.shape
    if case.name == "steered":
        steers = {name: path for name, path in paths.items() if name[0] == "s"}
        check_operation(steers, shape, bench.dtype, max_rows=bench.max_rows)
    else:
        check_guidance(paths[case.name], shape, bench.dtype)
    check_engine(engine, [s if i % 2 == 0 else None for i, s in enumerate(case.steers)], shape)
    comparison = bench.run(case, tick)
    check_legs(comparison, steered=True)
    check_engine(engine, case.steers, shape)
    return comparison


class Bench:
    """The engines, each made when it is first needed, in the order that ``FIGURES`` needs them."""

    def __init__(
        self, args: argparse.Namespace, shape: Shape, model: Path, configs: dict[str, Any]
    ) -> None:
        self._args = args
        self.shape = shape
        self._model = model
        self._configs = configs
        self._engines: dict[str, Any] = {}

    def engine(self, name: str) -> Any:
        """An engine by its name in the module's docstring."""
        if name not in self._engines:
            self._engines[name] = self._make(name)
        return self._engines[name]

    @property
    def dtype(self) -> torch.dtype:
        """What vLLM settled on, of any engine made so far."""
        llm = next(iter(self._engines.values()), None) or self.engine("bare")
        return llm.llm_engine.vllm_config.model_config.dtype

    @property
    def max_rows(self) -> int:
        """The largest batch that the engines take."""
        return max(self._args.rows + [rows for rows, _ in self._args.cases or ()])

    def run(self, case: Case, tick: Any) -> Comparison:
        """The legs of a case."""
        engines = [self.engine(name) for name in ENGINES[case.name]]
        legs = [
            partial(run_leg, llm, steers, self._args.steps, self.shape.vocab_size)
            for llm, steers in zip(engines, ([None] * case.rows, case.steers), strict=True)
        ]
        return compare(*legs, rounds=self._args.repeats, tick=tick)

    def profile(self, case: Case, steps: int) -> list[dict[str, Any]]:
        """What the device did in some steps of a case's B legs, the longest first."""
        engine = self.engine(ENGINES[case.name][1])
        return profile_steps(engine, case.steers, steps, self.shape.vocab_size)

    def _make(self, name: str) -> Any:
        os.environ["VLLM_STEER_DISABLE"] = "1" if name == "bare" else "0"
        from vllm import LLM

        if name != "bare":
            from vllm_steer.plugin import register

            register()
        options: dict[str, Any] = {}
        if torch.cuda.is_available():
            options["gpu_memory_utilization"] = self._args.gpu_memory
        if self._args.capture_sizes:
            sizes = {"cudagraph_capture_sizes": self._args.capture_sizes}
            options["compilation_config"] = sizes
        return LLM(
            str(self._model),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=self._args.dtype,
            max_model_len=256,
            max_num_seqs=self.max_rows,
            distributed_executor_backend="uni",
            enable_prefix_caching=False,
            additional_config={"steer": self._configs[name]} if name in self._configs else {},
            **options,
        )


def _cases(figure: str, args: argparse.Namespace) -> Iterator[Case]:
    if args.cases:
        wanted = [(rows, distinct) for rows, distinct in args.cases if figure == "steered"]
        wanted += [(rows, 0) for rows in args.rows if figure not in STEERING]
        wanted += [(rows, rows) for rows in args.rows if figure in ("guided", "rotated")]
        yield from (Case(figure, rows, distinct) for rows, distinct in wanted)
        return
    for rows in args.rows:
        shared = [rows] if figure in STEERING else [0]
        if figure == "steered":
            shared = sorted({min(d, rows) for d in args.distinct})
        yield from (Case(figure, rows, distinct) for distinct in shared)


def _line(
    case: Case, comparison: Comparison, args: argparse.Namespace, dtype: torch.dtype
) -> dict[str, Any]:
    shape, rank = SHAPES[args.shape], args.rank if case.name == "steered" else 0
    size = {"rows": case.rows, "itemsize": dtype.itemsize}
    floor, flops = 0, 0
    if case.name == "steered":
        floor = steer_bytes(shape, distinct=case.distinct, rank=rank, **size)
        flops = 4 * case.rows * shape.hidden_size * rank
    elif case.name in STEERING:
        floor = guidance_bytes(shape, **size)
        flops = (2 if case.name == "guided" else 9) * shape.layers * case.rows * shape.hidden_size
    context = PROMPT_TOKENS + LEAD_STEPS + args.steps // 2
    return {
        "name": case.name,
        "rows": case.rows,
        "distinct": case.distinct,
        "rank": rank,
        **comparison.summary(),
        "floor_bytes": floor,
        "flops": flops,
        "predicted_ratio": round(1 + floor / step_bytes(shape, context=context, **size), 4),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="result file")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-medium")
    parser.add_argument("--rank", type=int, default=1000)
    parser.add_argument("--rows", type=_numbers, default=[1, 4, 8, 32], metavar="N,N,...")
    parser.add_argument("--distinct", type=_numbers, default=[1, 4, 32], metavar="N,N,...")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--repeats", type=int, default=11, metavar="N", help="rounds per case")
    parser.add_argument("--steps", type=int, default=24, metavar="N", help="timed steps per leg")
    parser.add_argument(
        "--figures",
        type=_figures,
        default=list(FIGURES),
        metavar="NAME,...",
        help=f"some of {', '.join(FIGURES)}, in the order to measure them in",
    )
    parser.add_argument(
        "--cases",
        type=_pairs,
        metavar="ROWS:STEERS,...",
        help="of the figure steered: these and not every --rows with every --distinct",
    )
    parser.add_argument(
        "--capture-sizes",
        type=_numbers,
        metavar="N,N,...",
        help="batch sizes of the engines' CUDA graphs; default: vLLM's own",
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=0.25, metavar="SHARE", help="of the card, per engine"
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="profile N steps of each steered case"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="begin no case later than this; what is left out stands in the result",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.distinct, args.repeats, args.steps = [1, 4], [1, 4], 2, 4
    return args


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 are wanted, as in 1,4,32")
    return numbers


def _figures(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(FIGURES):
        raise argparse.ArgumentTypeError(
            f"unknown figures {', '.join(sorted(unknown))}; known: {', '.join(FIGURES)}"
        )
    return names


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
