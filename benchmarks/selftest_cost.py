"""What the self-test and the check of steers add: ``python -m benchmarks.selftest_cost``.

A Llama of 81 M random parameters with 12 layers, and the same with more layers; a vector in every
layer at three sites. Seconds are measured around both functions, the smallest of the repeats;
memory is the growth of the process's largest resident size, the largest of the repeats.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.dummy_model import llama, write_model
from benchmarks.engines import make_engine, set_environment
from benchmarks.result import Result

_SITES = ("resid", "attn_in", "attn_out")


def _timed(owner: Any, name: str, line: dict[str, Any]) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        before, size = time.perf_counter(), _largest_mib()
        result = original(*args, **kwargs)
        line[f"{name}_s"] = round(time.perf_counter() - before, 3)
        line[f"{name}_mib"] = round(_largest_mib() - size, 1)
        return result

    setattr(owner, name, timed)


def _largest_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(num_layers: int, folder: Path) -> dict[str, Any]:
    """Start one engine, and return what the two steps took."""
    from vllm_steer import VectorSteer, save_steer
    from vllm_steer.serving import layers, worker

    shape = llama(640, 1728, num_layers, 10, 32000)
    model = write_model(shape, folder / "model")
    steers = {}
    for site in _SITES:
        rows = torch.randn(num_layers, shape.hidden_size)
        every = tuple(range(num_layers))
        save_steer(VectorSteer(vectors=rows, layers=every, site=site), folder / f"{site}.st")
        steers[site] = {"path": str(folder / f"{site}.st")}
    line: dict[str, Any] = {"layers": num_layers, "parameters": shape.read_params}
    originals = [
        (owner, name, getattr(owner, name))
        for owner, name in ((worker, "model_sites"), (layers, "check_steering"))
    ]
    for owner, name, _ in originals:
        _timed(owner, name, line)
    start = time.perf_counter()
    llm = make_engine(
        model, {"steers": steers}, enforce_eager=True, load_format="dummy", dtype="bfloat16"
    )
    line["start_s"] = round(time.perf_counter() - start, 1)
    llm.llm_engine.engine_core.shutdown()
    for owner, name, original in originals:
        setattr(owner, name, original)
    return line


def main() -> None:
    """Measure one engine per number of layers, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    set_environment()
    result = Result("selftest_cost", args.json)
    for num_layers in args.layers:
        repeats = []
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as name:
                repeats.append(measure(num_layers, Path(name)))
        best = {
            key: (max if key.endswith("_mib") else min)(r[key] for r in repeats)
            for key in repeats[0]
        }
        result.add(best, str(best))


if __name__ == "__main__":
    main()
