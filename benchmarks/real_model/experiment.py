"""What all experiments on a pretrained model share: command line, data files, standard errors."""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from benchmarks import arguments
from vllm_steer.evaluation.standard_errors import jackknife_error

T = TypeVar("T")
BUILD: Final = Path("build/real-model")


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The options of an experiment: model, data, and the folder in which it can be resumed."""
    result = arguments.parser(doc)
    result.add_argument("--model", default=str(BUILD / "gemma3-270m"), help="a folder or hub id")
    result.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of the papers' data: dac/, sst5/, prompts/",
    )
    result.add_argument(
        "--folder",
        type=Path,
        default=BUILD / "runs" / name,
        help="texts, steers and fits; the same command goes on where it was interrupted",
    )
    return result


def jackknife(
    observations: Sequence[T], statistic: Callable[[Sequence[T]], float]
) -> tuple[float, float]:
    """A statistic and its standard error, by leaving out one observation at a time.

    For a mean this is its usual standard error. An observation is all that belongs to one prompt,
    since the texts of one prompt are not independent.
    """
    value = statistic(observations)
    if len(observations) < 2:
        return value, math.nan
    parts = ([*observations[:i], *observations[i + 1 :]] for i in range(len(observations)))
    return value, jackknife_error([statistic(part) for part in parts])


@contextmanager
def timed(folder: Path, part: str) -> Iterator[None]:
    """Add the seconds of the block to those of earlier, interrupted runs of the part."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds = seconds_of(folder)
        seconds[part] = round(seconds.get(part, 0.0) + time.monotonic() - start, 1)
        (folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def seconds_of(folder: Path) -> dict[str, float]:
    """Seconds of each part, over all runs in the folder."""
    path = folder / "seconds.json"
    found: dict[str, float] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


@functools.cache
def language_model(name: str, dtype: str = "auto") -> Any:
    """The model in Hugging Face's form, loaded once."""
    from vllm_steer.models import load_language_model

    return load_language_model(name, dtype=dtype)


@functools.cache
def steer_file(path: Path) -> Any:
    """A steer, read once."""
    from vllm_steer.files import load_steer

    return load_steer(path)
