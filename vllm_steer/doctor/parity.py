"""Parity of a vLLM engine with a Hugging Face forward pass, under random trial steers.

Two engines run one after the other: one with vectors, deltas and LM-Steers, one with the kinds that
read the token and with a condition, for which an engine has other kernels. Each runs three batches
with the same prompts: unsteered, with every trial steer at strength 0, and with each trial steer
alone at a large strength. At strength 0 every token and log-probability must equal the unsteered
one bit for bit. At a large strength the log-probabilities must be those of Hugging Face on the
engine's own tokens, and differ clearly from the unsteered ones.
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
from vllm_steer.doctor.engine_process import Completion, EngineOutput, Job
from vllm_steer.doctor.finding import Finding, State
from vllm_steer.doctor.parity_trials import ParityTrials, without_refused
from vllm_steer.doctor.reading_trials import reading_trials
from vllm_steer.doctor.reference import (
    ReferenceComparison,
    Scores,
    compare_with_reference,
    largest_difference,
    load_model,
    score,
)
from vllm_steer.doctor.trials import TOKENS, measure_sizes, prompts, trial_steers, trial_strength
from vllm_steer.errors import SteerError
from vllm_steer.files import save_steer
from vllm_steer.models import load_tokenizer, model_path
from vllm_steer.steers import ConditionSteer, Steer
from vllm_steer.steers.layers import format_layers

PART = "parity"
READING: Final = ", reading"
"""What the findings on the second engine itself are called in addition."""
TOLERANCE: Final = {"float32": 1e-3}
"""Maximum difference of a log-probability from Hugging Face in float32.

In a narrower dtype it is ``WIDER`` times what Hugging Face in that dtype differs by from itself in
float32, under the same steer and on the same tokens: the model's own rounding. It is at least
``FLOOR``.
"""
WIDER: Final = 3.0
FLOOR: Final = 0.05
PLAIN: Final = 4.0
"""A steer must change log-probabilities by this many tolerances, to exclude rounding."""
_LONGEST: Final = 256


def parity(architecture: Architecture, options: Mapping[str, Any]) -> Iterator[Finding]:
    """Run all trials and yield the findings. ``options`` are engine arguments, including ``dtype``.

    The reference model is loaded before the engines, to measure its activations, and again after
    each has ended, in the engine's dtype and in float32, so the device never holds two.
    """
    plain, reading = _prepare(architecture, str(options["dtype"]))
    output = None
    for trials, suffix in ((plain, ""), (without_refused(reading, options), READING)):
        if not trials.steers:
            continue
        if output is not None and not output.runner:
            yield from _not_tested(trials, "the first engine did not start")
            continue
        with tempfile.TemporaryDirectory(prefix="vllm-steer-doctor-") as folder:
            job = _job(architecture, trials, options, Path(folder))
            output, problem = run_engine(job, Path(folder))
        yield _started(output, problem, suffix)
        if not suffix:
            yield from found_sites(output)
        yield zero_steers(output, suffix)
        yield from _compare_with_model(architecture, trials, output, suffix)


def _started(output: EngineOutput, problem: str, suffix: str) -> Finding:
    if not output.runner:
        return Finding(PART, f"engine{suffix}", "FAILED", problem)
    message = f"model runner {output.runner} on {output.device}, {output.dtype}"
    figures = {"runner": output.runner, "device": output.device, "dtype": output.dtype}
    state: State = "FAILED" if problem else "ok"
    return Finding(PART, f"engine{suffix}", state, problem or message, figures)


def _not_tested(trials: ParityTrials, reason: str) -> Iterator[Finding]:
    for name in trials.options:
        yield Finding(PART, name, "not tested", reason)
    for name, refused in trials.not_tested.items():
        yield Finding(PART, name, "not tested", refused)


def _prepare(architecture: Architecture, dtype: str) -> tuple[ParityTrials, ParityTrials]:
    """The trials of the first and of the second engine."""
    try:
        tokenizer = load_tokenizer(architecture.name)
    except SteerError:
        tokenizer = None
    texts = prompts(architecture, tokenizer)
    model = load_model(architecture.name, dtype)
    sizes = measure_sizes(model, architecture, texts)
    reading = ParityTrials(*reading_trials(model, architecture, texts), texts)
    del model
    _free()
    steers = trial_steers(architecture, sizes)
    strengths = {name: trial_strength(name, steer, sizes) for name, steer in steers.items()}
    return ParityTrials(steers, strengths, texts), reading


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


def found_sites(output: EngineOutput) -> Iterator[Finding]:
    """What the engine's self-test says of each site inside the layers."""
    proofs = {
        "compared": "compared with Hugging Face in vllm-steer's tests",
        "proved": "proved by this engine's self-test",
    }
    for site, found in output.sites.items():
        layers = f"layers {format_layers(found['layers'])}" if found["layers"] else "no layer"
        reasons = [f"not in layer {layer}: {reason}" for layer, reason in found["refused"].items()]
        message = f"{layers}, {proofs[found['proof']]}" if found["layers"] else layers
        state: State = "ok" if found["layers"] else "missing"
        yield Finding(PART, f"found {site}", state, "; ".join([message, *reasons[:1]]), found)


def zero_steers(output: EngineOutput, suffix: str = "") -> Finding:
    """Whether tokens and log-probabilities at strength 0 equal the unsteered ones bit for bit."""
    name = f"zero steers{suffix}"
    if "zero" not in output.batches:
        return Finding(PART, name, "not tested", "the engine gave no output")
    pairs = list(zip(output.batches["unsteered"], output.batches["zero"], strict=True))
    same = sum((a.tokens, a.logprobs) == (b.tokens, b.logprobs) for a, b in pairs)
    message = "outputs at strength 0 equal those without a steer in the same engine, bit for bit"
    state: State = "ok" if same == len(pairs) else "FAILED"
    return Finding(PART, name, state, f"{same} of {len(pairs)} {message}", {"equal": same})


def _compare_with_model(
    architecture: Architecture, trials: ParityTrials, output: EngineOutput, suffix: str
) -> Iterator[Finding]:
    if "unsteered" not in output.batches:
        yield from _not_tested(trials, "the engine gave no output")
        return
    rounded = None
    if output.dtype not in TOLERANCE:
        rounded = score_all(load_model(architecture.name, output.dtype), trials.steers, output)
        _free()
    exact = score_all(load_model(architecture.name, "float32"), trials.steers, output)
    yield from compare(trials.steers, output, exact, rounded, suffix)
    for name, reason in trials.not_tested.items():
        yield Finding(PART, name, "not tested", reason)


@dataclass(frozen=True)
class ReferenceScores:
    """A reference's scores of the unsteered completions, and by steer of the steered ones:
    under the steer, and without it.
    """

    unsteered: Sequence[Scores]
    steered: Mapping[str, Sequence[Scores]]
    without: Mapping[str, Sequence[Scores]]


def score_all(model: Any, steers: Mapping[str, Steer], output: EngineOutput) -> ReferenceScores:
    """The scores of the reference ``model`` for all completions of an engine."""
    by_steer = {name: _completions(name, output) for name in _acting(steers)}
    return ReferenceScores(
        [score(model, one, steers) for one in output.batches["unsteered"]],
        {name: [score(model, one, steers) for one in ones] for name, ones in by_steer.items()},
        {
            name: [score(model, one, steers, steered=False) for one in ones]
            for name, ones in by_steer.items()
        },
    )


def _acting(steers: Mapping[str, Steer]) -> list[str]:
    """The steers that change something by themselves: all but conditions."""
    return [name for name, steer in steers.items() if not isinstance(steer, ConditionSteer)]


def _completions(name: str, output: EngineOutput) -> list[Completion]:
    return [one for one in output.batches.get("large", []) if name in one.setting]


def compare(
    steers: Mapping[str, Steer],
    output: EngineOutput,
    exact: ReferenceScores,
    rounded: ReferenceScores | None = None,
    suffix: str = "",
) -> Iterator[Finding]:
    """Compare each batch of an engine with the reference; conditions have no finding of their own.

    ``exact`` are its scores in float32, ``rounded`` those in the engine's dtype, None for float32.
    """
    unsteered = compare_with_reference(output.batches["unsteered"], exact.unsteered)
    rounding = None if rounded is None else largest_difference(exact.unsteered, rounded.unsteered)
    yield _finding(f"unsteered{suffix}", unsteered, rounding)
    for name in _acting(steers):
        completions = _completions(name, output)
        if not completions:
            yield Finding(PART, name, "not tested", "the engine gave no output")
            continue
        scores = exact.steered[name]
        effect = compare_with_reference(completions, exact.without[name]).difference
        rounding = None if rounded is None else largest_difference(scores, rounded.steered[name])
        comparison = compare_with_reference(completions, scores)
        yield _finding(name, comparison, rounding, effect=effect)


def _finding(
    name: str,
    comparison: ReferenceComparison,
    rounding: float | None,
    *,
    effect: float | None = None,
) -> Finding:
    """The finding on one batch or steer.

    ``rounding`` is that of the reference in the engine's dtype, None for float32; ``effect`` is the
    difference from the unsteered reference.

    The engine may choose another token only if the reference rates it as nearly equal: each of the
    two log-probabilities may deviate by the tolerance.
    """
    tolerance = TOLERANCE["float32"] if rounding is None else max(FLOOR, WIDER * rounding)
    figures = {
        **asdict(comparison),
        "tolerance": tolerance,
        "rounding": rounding,
        "effect": effect,
    }
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
