"""Parity of a vLLM engine with a Hugging Face forward pass, under random trial steers.

The engine runs three batches with the same prompts: unsteered, with every trial steer at strength
0, and with each trial steer alone at a large strength. At strength 0 every token and
log-probability must equal the unsteered one bit for bit. At a large strength the log-probabilities
must be those of Hugging Face on the engine's own tokens, and differ clearly from the unsteered
ones.
"""

import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from vllm_steer.doctor.architecture import Architecture
from vllm_steer.doctor.engine import run_engine
from vllm_steer.doctor.engine_process import EngineOutput, Job
from vllm_steer.doctor.finding import Finding, State
from vllm_steer.doctor.reference import ReferenceComparison, compare_with_reference, load_model
from vllm_steer.doctor.trials import TOKENS, measure_sizes, prompts, trial_steers, trial_strength
from vllm_steer.errors import SteerError
from vllm_steer.files import save_steer
from vllm_steer.models import load_tokenizer, model_path
from vllm_steer.steers import Steer

PART = "parity"
TOLERANCE: Final = {"float32": 1e-3}
"""Maximum difference of a log-probability.

In a narrower dtype it is ``WIDER`` times the difference of the unsteered model, at least ``FLOOR``
and at most ``CEILING``, which is also the tolerance of the unsteered model.
"""
WIDER: Final = 4.0
FLOOR: Final = 0.05
CEILING: Final = 0.5
PLAIN: Final = 4.0
"""A steer must change log-probabilities by this many tolerances, to exclude rounding."""
_LONGEST: Final = 256


@dataclass(frozen=True)
class ParityTrials:
    """The trial steers, the strength of each, and the prompts."""

    steers: Mapping[str, Steer]
    strengths: Mapping[str, float]
    prompts: Sequence[list[int]]

    @property
    def batches(self) -> dict[str, list[dict[str, float]]]:
        """The settings of the three batches."""
        return {
            "unsteered": [{}],
            "zero": [dict.fromkeys(self.steers, 0.0)],
            "large": [{name: strength} for name, strength in self.strengths.items()],
        }


def parity(architecture: Architecture, options: Mapping[str, Any]) -> Iterator[Finding]:
    """Run all trials and yield the findings. ``options`` are engine arguments, including ``dtype``.

    The reference model is loaded before the engine, to measure its activations, and again after the
    engine has ended, in the engine's dtype, so the device never holds both.
    """
    trials = _prepare(architecture, str(options["dtype"]))
    with tempfile.TemporaryDirectory(prefix="vllm-steer-doctor-") as folder:
        job = _job(architecture, trials, options, Path(folder))
        output, problem = run_engine(job, Path(folder))
    if output.runner:
        message = f"model runner {output.runner} on {output.device}, {output.dtype}"
        figures = {"runner": output.runner, "device": output.device, "dtype": output.dtype}
        yield Finding(PART, "engine", "FAILED" if problem else "ok", problem or message, figures)
    else:
        yield Finding(PART, "engine", "FAILED", problem)
    yield zero_steers(output)
    yield from _compare_with_model(architecture, trials, output)


def _prepare(architecture: Architecture, dtype: str) -> ParityTrials:
    try:
        tokenizer = load_tokenizer(architecture.name)
    except SteerError:
        tokenizer = None
    texts = prompts(architecture, tokenizer)
    model = load_model(architecture.name, dtype)
    sizes = measure_sizes(model, architecture, texts)
    del model
    _free()
    steers = trial_steers(architecture, sizes)
    strengths = {name: trial_strength(name, steer, sizes) for name, steer in steers.items()}
    return ParityTrials(steers, strengths, texts)


def _job(
    architecture: Architecture, trials: ParityTrials, options: Mapping[str, Any], folder: Path
) -> Job:
    paths = {name: folder / f"{name}.safetensors" for name in trials.steers}
    for name, steer in trials.steers.items():
        save_steer(steer, paths[name])
    longest = {"max_model_len": min(_LONGEST, architecture.longest)}
    return Job(
        model=model_path(architecture.name),
        options={**longest, **options},
        steers={name: str(path) for name, path in paths.items()},
        prompts=list(trials.prompts),
        batches=trials.batches,
        max_tokens=TOKENS,
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def zero_steers(output: EngineOutput) -> Finding:
    """Whether tokens and log-probabilities at strength 0 equal the unsteered ones bit for bit."""
    name = "zero steers"
    if "zero" not in output.batches:
        return Finding(PART, name, "not tested", "the engine gave no output")
    pairs = list(zip(output.batches["unsteered"], output.batches["zero"], strict=True))
    same = sum((a.tokens, a.logprobs) == (b.tokens, b.logprobs) for a, b in pairs)
    message = "outputs at strength 0 equal those without a steer in the same engine, bit for bit"
    state: State = "ok" if same == len(pairs) else "FAILED"
    return Finding(PART, name, state, f"{same} of {len(pairs)} {message}", {"equal": same})


def _compare_with_model(
    architecture: Architecture, trials: ParityTrials, output: EngineOutput
) -> Iterator[Finding]:
    if "unsteered" not in output.batches:
        for name in trials.steers:
            yield Finding(PART, name, "not tested", "the engine gave no output")
        return
    model = load_model(architecture.name, output.dtype)
    yield from compare(model, trials.steers, output)


def compare(model: Any, steers: Mapping[str, Steer], output: EngineOutput) -> Iterator[Finding]:
    """Compare each batch of an engine with the reference ``model`` in the same dtype."""
    unsteered = compare_with_reference(model, output.batches["unsteered"], steers)
    yield _finding("unsteered", unsteered, TOLERANCE.get(output.dtype, CEILING))
    by_dtype = min(CEILING, max(FLOOR, WIDER * unsteered.difference))
    tolerance = TOLERANCE.get(output.dtype, by_dtype)
    large = output.batches.get("large", [])
    for name in steers:
        completions = [answer for answer in large if name in answer.setting]
        if not completions:
            yield Finding(PART, name, "not tested", "the engine gave no output")
        else:
            effect = compare_with_reference(model, completions, steers, steered=False).difference
            comparison = compare_with_reference(model, completions, steers)
            yield _finding(name, comparison, tolerance, effect=effect)


def _finding(
    name: str, comparison: ReferenceComparison, tolerance: float, *, effect: float | None = None
) -> Finding:
    """The finding on one batch or steer; ``effect`` is the difference from the unsteered reference.

    The engine may choose another token only if the reference rates it as nearly equal: each of the
    two log-probabilities may deviate by the tolerance.
    """
    figures = {**asdict(comparison), "tolerance": tolerance, "effect": effect}
    message = (
        f"within {comparison.difference:.1e} of Hugging Face (allowed {tolerance:.1g}), "
        f"{comparison.agreement:.1%} equal tokens"
    )
    if comparison.difference > tolerance or comparison.shortfall > 2 * tolerance:
        if effect is not None and effect <= tolerance:
            message = f"not steered: the output is that of the unsteered model; {message}"
        return Finding(PART, name, "FAILED", message, figures)
    if effect is not None:
        message += f"; {effect:.2g} from the unsteered model"
        if effect < PLAIN * tolerance:
            return Finding(
                PART, name, "not tested", f"{message}: too small a change to verify", figures
            )
    return Finding(PART, name, "ok", message, figures)
