"""The training loop of LM-Steers: hidden states, head, Adam, checkpoints."""

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.fit.encoded_texts import EncodedTexts, TextBatch
from vllm_steer.fit.hidden_states import (
    FetchHiddenStates,
    HiddenStateFile,
    fetch_from_file,
    fetch_from_model,
    plan_storage,
    write_hidden_states,
)
from vllm_steer.fit.lm_steer_settings import FitCallbacks, LMSteerSettings
from vllm_steer.fit.objective import TokenBatch, initial_parameters, loss_and_gradients
from vllm_steer.fit.training_run import (
    HIDDEN_STATES,
    Checkpoints,
    TrainingState,
    fingerprint,
    resume,
    start_training,
)
from vllm_steer.hf.lm_head import LMHead
from vllm_steer.hf.sites import widened
from vllm_steer.run_folder import locked


@dataclass(frozen=True)
class FitInputs:
    """The inputs of a fit, constant over all steps."""

    model: Any
    head: LMHead
    encoded: EncodedTexts
    batches: Sequence[TextBatch]  # one per step
    labels: Sequence[float]
    settings: LMSteerSettings


def train(
    fit: FitInputs, run: Checkpoints | None, *, cache_bytes: int, callbacks: FitCallbacks
) -> TrainingState:
    """Run the remaining steps; with a ``run``, the last checkpoint is that of the last step.

    Raises ``SteerError`` for a run of other settings, a file that cannot be written, and a loss
    that is no number.
    """
    training = _initial_state(fit)
    with ExitStack() as stack:
        if run is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = run.folder
            stack.enter_context(locked(folder))
        hidden_size = fit.head.weight.shape[1]
        stored = plan_storage(fit.model, fit.batches, folder / HIDDEN_STATES, hidden_size)
        cached = stored.bytes <= cache_bytes
        if run is not None:
            run.settings.update(_run_identity(fit, cached))
            resume(run, training)
            if training.step:
                callbacks.on_message(f"going on after step {training.step} of {fit.settings.steps}")
        if cached:
            fetch = _from_file(fit, stored, stack, callbacks)
        else:
            size = f"{stored.bytes / 2**30:.1f} GiB"
            callbacks.on_message(
                f"the hidden states take {size}: they are computed for each step instead"
            )
            fetch = fetch_from_model(fit.model, fit.encoded)
        for _ in range(training.step, fit.settings.steps):
            _step(fit, training, fetch)
            callbacks.on_step(training.step - 1, training.losses[-1])
            if run is not None:
                run.keep(training, last=training.step == fit.settings.steps)
    return training


def _from_file(
    fit: FitInputs, stored: HiddenStateFile, stack: ExitStack, callbacks: FitCallbacks
) -> FetchHiddenStates:
    write_hidden_states(fit.model, fit.encoded, stored, callbacks.on_text)
    return fetch_from_file(stack.enter_context(stored.path.open("rb", buffering=0)), stored)


def _step(fit: FitInputs, training: TrainingState, fetch: FetchHiddenStates) -> None:
    batch = fit.batches[training.step]
    loss, gradients = loss_and_gradients(
        fit.head,
        _tokens(fit, batch, fetch(batch)),
        training.parameters,
        epsilon=fit.settings.epsilon,
        regularization=fit.settings.regularization,
    )
    if not math.isfinite(loss):
        raise SteerError(
            f"step {training.step}: the loss is {loss}; training stopped, and the last checkpoint "
            "is kept; give a lower learning rate or epsilon, or a wider dtype"
        )
    for name, parameter in training.parameters.items():
        parameter.grad = gradients[name]
    training.optimizer.step()
    training.losses.append(loss)


def _tokens(fit: FitInputs, batch: TextBatch, hidden_states: torch.Tensor) -> TokenBatch:
    """The tokens of a step on the model's device, with the strengths of their texts."""
    device, wide = fit.head.weight.device, widened(hidden_states.to(fit.head.weight.device))
    pairs = list(zip(batch.rows, batch.counts, strict=True))
    targets = torch.cat([fit.encoded.targets(row, count) for row, count in pairs])
    of_texts = torch.ones((len(pairs), fit.settings.columns), dtype=wide.dtype)
    of_texts[:, 0] = torch.tensor([fit.labels[row] for row in batch.rows], dtype=wide.dtype)
    strengths = of_texts.repeat_interleave(torch.tensor(batch.counts), dim=0)
    return TokenBatch(wide, targets.to(device), strengths.to(device))


def _initial_state(fit: FitInputs) -> TrainingState:
    settings, (vocab_size, hidden_size) = fit.settings, fit.head.weight.shape
    try:
        start = initial_parameters(
            settings.variant,
            columns=settings.columns,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            rank=settings.rank,
            initial_scale=settings.initial_scale,
            seed=settings.seed,
        )
    except RuntimeError as error:  # torch's words for an allocation that fails
        raise SteerError(
            f"rank {settings.rank}: there is no memory for the parameters ({cause(error)}); give a "
            "smaller rank"
        ) from error
    dtype = widened(fit.head.weight[:1]).dtype
    masters = {name: value.to(fit.head.weight.device, dtype) for name, value in start.items()}
    return start_training(masters, settings.learning_rate)


def _run_identity(fit: FitInputs, cached: bool) -> dict[str, Any]:
    """Properties that must be equal for a run to be resumed."""
    return {
        "model": fingerprint(fit.head.weight),
        "dtype": str(fit.head.weight.dtype),
        "device": fit.head.weight.device.type,
        "cached": cached,
    }
