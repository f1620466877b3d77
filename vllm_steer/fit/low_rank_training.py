"""The training loop of low-rank maps: forward passes through the hooked model, AdamW, checkpoints.

The loss is that of the LM head on the scored tokens alone, in chunks: the logits of whole texts
would take gigabytes where the vocabulary is large.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_steer.doses import Dose, token_spans
from vllm_steer.errors import SteerError
from vllm_steer.fit.encoded_texts import shuffled
from vllm_steer.fit.head_loss import HeadLoss, head_loss
from vllm_steer.fit.lm_steer_settings import FitCallbacks
from vllm_steer.fit.low_rank_maps import Factors, factors, initial_parameters
from vllm_steer.fit.low_rank_settings import LowRankSettings
from vllm_steer.fit.scored_texts import ScoredText
from vllm_steer.fit.training_run import Checkpoints, TrainingState, fingerprint, resume
from vllm_steer.hf import equations, sites
from vllm_steer.hf.language_model import backbone
from vllm_steer.hf.lm_head import LMHead
from vllm_steer.run_folder import locked


class TrainingText(NamedTuple):
    """A text with the strength of the map on each of its tokens, 0 where it does not act."""

    scored: ScoredText
    strengths: torch.Tensor  # [tokens] float32


@dataclass(frozen=True)
class LowRankFit:
    """The inputs of a fit, constant over all steps."""

    model: Any
    head: LMHead
    train: Sequence[TrainingText]
    valid: Sequence[TrainingText]
    layers: tuple[int, ...]
    width: int  # of the site
    settings: LowRankSettings


def training_text(scored: ScoredText, strength: float, settings: LowRankSettings) -> TrainingText:
    """A text with the strengths of its tokens, by the phase or windows of the settings."""
    dose = Dose("", strength, phase=settings.tokens)
    strengths = torch.zeros(len(scored.ids))
    for first, last in token_spans(dose, None, scored.start):
        strengths[first:last] = strength
    return TrainingText(scored, strengths)


def train(fit: LowRankFit, run: Checkpoints | None, callbacks: FitCallbacks) -> TrainingState:
    """Run the remaining steps; with a ``run``, the last checkpoint is that of the last step.

    Raises ``SteerError`` for a run of other settings, a file that cannot be written, and a loss
    that is no number.
    """
    settings, training = fit.settings, _initial_state(fit)
    count = min(settings.batch_size, len(fit.train))
    batches = list(shuffled(range(len(fit.train)), count, settings.steps, settings.seed))
    with ExitStack() as stack:
        if run is not None:
            stack.enter_context(locked(run.folder))
            run.settings.update(_run_identity(fit))
            resume(run, training)
            if training.step:
                callbacks.on_message(f"going on after step {training.step} of {settings.steps}")
        for step in range(training.step, settings.steps):
            _step(fit, training, [fit.train[row] for row in batches[step]])
            callbacks.on_step(step, training.losses[-1])
            if run is not None:
                run.keep(training, last=training.step == settings.steps)
    return training


@torch.no_grad()
def mean_loss(
    fit: LowRankFit,
    texts: Sequence[TrainingText],
    maps: Factors | None,
    on_text: Callable[[int, int], None] = lambda _done, _total: None,
) -> float:
    """The mean over all scored tokens of ``-log p``, under the maps or of the model itself.

    ``on_text`` is called with the number of texts read and their total.
    """
    total, count = 0.0, 0
    for start in range(0, len(texts), fit.settings.batch_size):
        batch = texts[start : start + fit.settings.batch_size]
        total += float(_batch_loss(fit, batch, maps)[1].total)
        count += sum(text.scored.num_scored for text in batch)
        on_text(start + len(batch), len(texts))
    return total / count


def batch_gradients(
    fit: LowRankFit, batch: Sequence[TrainingText], parameters: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of a batch and its gradient by each of the parameters."""
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    count = sum(text.scored.num_scored for text in batch)
    with torch.enable_grad():
        hidden_states, loss = _batch_loss(fit, batch, factors(leaves))
        gradients = torch.autograd.grad(hidden_states, list(leaves.values()), loss.gradient / count)
    return float(loss.total) / count, dict(zip(leaves, gradients, strict=True))


def _step(fit: LowRankFit, training: TrainingState, batch: Sequence[TrainingText]) -> None:
    loss, gradients = batch_gradients(fit, batch, dict(training.parameters))
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    if not (math.isfinite(loss) and finite):
        what = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        raise SteerError(
            f"step {training.step}: {what}; training stopped; give a lower learning rate, or a "
            "wider dtype"
        )
    settings = fit.settings
    rate = settings.learning_rate * (1 - training.step / settings.steps)
    training.optimizer.param_groups[0]["lr"] = rate
    for name, parameter in training.parameters.items():
        parameter.grad = gradients[name]
    training.optimizer.step()
    training.losses.append(loss)


def _batch_loss(
    fit: LowRankFit, batch: Sequence[TrainingText], maps: Factors | None
) -> tuple[torch.Tensor, HeadLoss]:
    """The head's inputs before the scored tokens, ``[scored, width]``, and their loss."""
    device = fit.model.device
    # Padding on the right, which causal attention never sees from the tokens before it.
    tokens, strengths = (
        torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
        for rows in zip(*((text.scored.ids.long(), text.strengths) for text in batch), strict=True)
    )
    is_scored = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, text in enumerate(batch):
        is_scored[row, text.scored.start : len(text.scored.ids)] = True
    is_scored = is_scored.to(device)[:, 1:]
    with _mapped(fit, maps, strengths[:, :-1]):
        states = backbone(fit.model)(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    hidden_states = states[is_scored.to(states.device)].to(fit.head.weight.device)
    targets = tokens[:, 1:][is_scored].to(fit.head.weight.device)
    return hidden_states, head_loss(fit.head, hidden_states, targets)


@contextmanager
def _mapped(fit: LowRankFit, maps: Factors | None, strengths: torch.Tensor) -> Iterator[None]:
    """Context in which each layer's site passes through its map, at the tokens' strengths."""
    names, blocks = sites.family(fit.model), sites.layers_of(fit.model)
    with ExitStack() as hooks:
        for index, layer in enumerate(fit.layers if maps is not None else ()):
            assert maps is not None
            bias = None if maps.bias is None else maps.bias[index]
            act = _MapHook(maps.a[index], maps.b[index], bias, strengths)
            handle = sites.attach(blocks[layer], names, fit.settings.site, act)
            hooks.callback(handle.remove)
        yield


@dataclass(frozen=True)
class _MapHook:
    """A hook that adds ``v B (A x + b)`` where ``v`` is not 0, rounded once as ``hf.steered``."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    strengths: torch.Tensor  # [batch, tokens]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = sites.widened(x)
        bias = None if self.bias is None else self.bias.to(wide)
        change = equations.low_rank(wide, self.a.to(wide), self.b.to(wide), bias)
        v = self.strengths[..., None].to(wide)
        return torch.where(v != 0, (wide + v * change).to(x.dtype), x)


def _initial_state(fit: LowRankFit) -> TrainingState:
    settings, weight = fit.settings, fit.head.weight
    start = initial_parameters(
        settings.parameterization,
        layers=len(fit.layers),
        width=fit.width,
        rank=settings.rank,
        seed=settings.seed,
    )
    dtype = sites.widened(weight[:1]).dtype
    parameters = {name: value.to(weight.device, dtype) for name, value in start.items()}
    # Not fused: on a CPU that reads a gradient of other strides than its parameter's wrongly.
    adam = torch.optim.AdamW(
        list(parameters.values()),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=False,
    )
    return TrainingState(parameters, adam)


def _run_identity(fit: LowRankFit) -> dict[str, Any]:
    """Properties that must be equal for a run to be resumed."""
    weight = fit.head.weight
    return {
        "model": fingerprint(weight),
        "dtype": str(weight.dtype),
        "device": weight.device.type,
        "layers": list(fit.layers),
    }
