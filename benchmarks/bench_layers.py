"""What each way to steer inside the layers costs: ``python -m benchmarks.bench_layers``.

Every row of a batch has one steer at ``resid`` in every layer of a Llama; its step is compared with
that of the same engine when no row is steered, in rounds. ``directions`` is an engine with vectors
that add and rotate, and nothing else; ``readings`` one with every kind, whose site runs the kernel
for changes that depend on the token, whatever a request asks for.

Beside the measured cost stands what a step has to do in all layers, by counting:

    bytes   of the hidden states, read and written once, and of each distinct steer's vectors
    flops   2 per value that is multiplied and added
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.decode import BenchmarkEngine, compare, step_columns
from benchmarks.dummy_model import ModelShape, llama, write_model
from benchmarks.engines import make_engine, set_environment
from benchmarks.result import Result
from vllm_steer import ConditionSteer, LowRankSteer, SAESteer, Steer, VectorSteer, save_steer

SHAPE = llama(1024, 2752, 12, 16, 8192)
RANK = 8
STRENGTH = 0.5
OLD = ("add", "rotate")


def main() -> None:
    """Measure both engines."""
    parser = arguments.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a leg")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    set_environment()
    result = Result("layers", args.json, rank=RANK)
    with tempfile.TemporaryDirectory(prefix="bench-layers-") as name:
        folder = Path(name)
        write_model(SHAPE, folder / "model")
        steers = save_all(SHAPE, folder / "steers")
        for line in measure(args, folder, steers):
            result.add(line, str(line))
    result.show()


def steers_of(shape: ModelShape) -> dict[str, Steer]:
    """One steer of each kind and mode in every layer, and a condition that always holds."""
    generator = torch.Generator().manual_seed(0)
    layers, width = tuple(range(shape.layers)), shape.hidden_size

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) / width**0.5

    def vector(mode: Any) -> VectorSteer:
        return VectorSteer(vectors=normal(len(layers), width), layers=layers, mode=mode)

    feature = {
        "encoder": normal(len(layers), width),
        "decoder": normal(len(layers), width),
        "bias": torch.zeros(len(layers)),
        "threshold": torch.zeros(len(layers)),
    }
    return {
        **{mode: vector(mode) for mode in ("add", "rotate", "relative", "project")},
        "clamp": SAESteer(**feature, layers=layers, mode="clamp"),
        "low_rank": LowRankSteer(
            a=normal(len(layers), RANK, width), b=normal(len(layers), width, RANK), layers=layers
        ),
        "holds": ConditionSteer(vector=normal(1, width), layers=(0,), threshold=-2.0),
    }


def save_all(shape: ModelShape, folder: Path) -> dict[str, Any]:
    """Save the steers; a config with all of them."""
    folder.mkdir()
    for name, steer in steers_of(shape).items():
        save_steer(steer, folder / f"{name}.safetensors")
    return {name: {"path": str(folder / f"{name}.safetensors")} for name in steers_of(shape)}


def measure(
    args: argparse.Namespace, folder: Path, steers: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A line per engine, number of rows and steer."""
    configs = {
        "directions": {"steers": {name: steers[name] for name in OLD}},
        "readings": {"steers": steers},
    }
    engines = []  # an engine that is dropped takes vLLM's process groups along
    for what, config in configs.items():
        llm = make_engine(
            folder / "model",
            config,
            load_format="dummy",
            dtype="float32",
            max_num_seqs=max(args.rows),
        )
        engine = BenchmarkEngine(llm)
        engines.append(engine)
        requests = {name: {name: STRENGTH} for name in config["steers"] if name != "holds"}
        if "holds" in config["steers"]:
            requests["add, when"] = {"add": {"strength": STRENGTH, "when": "holds"}}
        for rows in args.rows:
            for name, request in requests.items():
                plain, own = [None] * rows, [json.dumps(request)] * rows
                rounds = compare(
                    (engine, plain), (engine, own), args.steps, SHAPE.vocab_size, args.rounds
                )
                yield {
                    "engine": what,
                    "steer": name,
                    "rows": rows,
                    **step_columns(rounds),
                    **work(name.split(",")[0], rows),
                }


def work(kind: str, rows: int, shape: ModelShape = SHAPE) -> dict[str, float]:
    """The bytes and flops of a step's changes in all layers, every row with the same steer."""
    width, value = shape.hidden_size, 4
    vectors = {"add": 1, "rotate": 1, "relative": 1, "project": 1, "clamp": 2, "low_rank": 2 * RANK}
    # Per value of a row: the addition, and norms or products with what is read.
    multiplied = {
        "add": 1,
        "rotate": 4,
        "relative": 2,
        "project": 2,
        "clamp": 2,
        "low_rank": 2 * RANK,
    }
    moved = shape.layers * width * value * (2 * rows + vectors[kind])
    return {
        "kib": moved / 2**10,
        "mflops": 2 * shape.layers * width * rows * multiplied[kind] / 1e6,
    }


if __name__ == "__main__":
    main()
