"""Tracks absolute token positions across forward passes, and the strength at each of them."""

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_steer.doses import Dose, token_spans
from vllm_steer.errors import SteerError
from vllm_steer.hf.language_model import decoder_of, placeholder_ids
from vllm_steer.steers.schedules import schedule_curve


@dataclass(frozen=True)
class PassPositions:
    """The tokens of one forward pass and where the prompt of their text ends."""

    positions: torch.Tensor  # [tokens] int64, from 0 at the text's first token
    prompt_length: int | None
    placeholders: torch.Tensor | None = None  # [tokens] bool; None if nothing said which they are

    @property
    def is_text(self) -> torch.Tensor:
        """The tokens that stand for no image, audio or video, ``[tokens]`` bool.

        Raises ``SteerError`` if nothing said which tokens do.
        """
        if self.placeholders is None:
            raise SteerError(
                "phase text: which tokens stand for images, audio or video is not known, because "
                "the model was given no token ids or its config has no id for them; give "
                "placeholders"
            )
        if self.prompt_length is None:
            return ~self.placeholders
        return ~self.placeholders | (self.positions >= self.prompt_length)

    @property
    def steps(self) -> torch.Tensor:
        """The generation step of each token, 0 at the last prompt token: ``p - (P - 1)``.

        Raises ``SteerError`` if nothing said where the prompt ends.
        """
        return self.positions - (self.prompt - 1)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt; ``SteerError`` if nothing said how many."""
        if self.prompt_length is None:
            raise SteerError(
                "the model goes on from a KV cache that was filled before this block: where the "
                "prompt ends is not known; give prompt_length"
            )
        return self.prompt_length


@dataclass(frozen=True)
class SteppedDose(Dose):
    """A dose whose strength at generation step ``i`` is ``history[i]``, and 0 at any other token.

    Its ``strength`` is always 1.
    """

    history: tuple[float, ...] = ()


def coefficients(dose: Dose, span: PassPositions, num_steps: int | None) -> torch.Tensor:
    """``a [tokens]``, float64: the strength on each token, 0 where the dose does not act.

    ``num_steps`` is that of a delta steer, None for the other kinds.
    """
    if isinstance(dose, SteppedDose):
        last = len(dose.history) if num_steps is None else min(num_steps, len(dose.history))
        history = torch.tensor(dose.history, dtype=torch.float64)
        inside = (span.steps >= 0) & (span.steps < last)
        return torch.where(inside, history[span.steps.clamp(0, last - 1)], 0.0)
    a = torch.full(span.positions.shape, dose.strength, dtype=torch.float64)
    if dose.phase == "text":
        a *= span.is_text
    if dose.phase in ("all", "text") and num_steps is None:
        return a
    acts = torch.zeros_like(span.positions, dtype=torch.bool)
    for first, last in token_spans(dose, num_steps, span.prompt):
        acts |= (span.positions >= first) & (span.positions < last)
    a *= acts
    if num_steps is None:
        return a
    return a * (1 - schedule_curve(dose.schedule, num_steps).slope * span.steps.double())


class PositionTracker:
    """Tracks absolute token positions across forward passes and ``generate`` calls.

    Outside of ``generate`` a forward pass with an empty cache begins a text. Within it, that is
    also what every step without a cache looks like, so there the prompt is what ``generate`` was
    given; if it goes on from a filled cache, that and the first forward pass.

    ``placeholders`` are the positions of the tokens that stand for images, audio or video; None:
    those with the ids that the model's config has for them.
    """

    def __init__(
        self, prompt_length: int | None, placeholders: Iterable[int] | None = None
    ) -> None:
        if prompt_length is not None and prompt_length < 1:
            raise SteerError(f"prompt_length is {prompt_length}; a prompt has at least one token")
        self._fixed = prompt_length is not None
        self._prompt_length = prompt_length
        self._given: int | None = None
        self._generating = self._is_first = False
        self._text = 0
        self._start = self._length = 0
        self._placeholders = None if placeholders is None else torch.tensor(sorted(placeholders))
        self._placeholder_ids: torch.Tensor | None = None
        self._given_ids: torch.Tensor | None = (
            None  # [batch, tokens], to a model around the decoder
        )
        self._ids: torch.Tensor | None = None  # [batch, tokens]

    @property
    def text(self) -> int:
        """The number of the text that the running forward pass belongs to.

        Without a cache, every step of ``generate`` is a pass over the same text.
        """
        return self._text

    @property
    def span(self) -> PassPositions:
        """The tokens of the forward pass that is running."""
        positions = torch.arange(self._start, self._start + self._length)
        return PassPositions(positions, self._prompt_length, self._placeholders_at(positions))

    def _placeholders_at(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Which tokens are placeholders, ``[tokens]`` bool; None if the ids are not known."""
        if self._placeholders is not None:
            return torch.isin(positions, self._placeholders)
        if self._placeholder_ids is None:
            return torch.zeros(positions.shape, dtype=torch.bool)
        if self._ids is None or not len(self._placeholder_ids):
            return None
        rows = torch.isin(self._ids.cpu(), self._placeholder_ids)
        if not (rows == rows[:1]).all():
            raise SteerError(
                "phase text: the rows of the batch have their images, audio or video at other "
                "places; steer them one after the other"
            )
        return rows[0]

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Within the block, learn of every forward pass and of every call of ``generate``."""
        hooks = [
            decoder_of(model).register_forward_pre_hook(self._before_forward, with_kwargs=True)
        ]
        ids = placeholder_ids(model)
        if ids is not None:
            self._placeholder_ids = torch.tensor(ids, dtype=torch.int64)
            hooks += [
                owner.register_forward_pre_hook(self._take_ids, with_kwargs=True)
                for owner in self._owners(model)
            ]
        outer = vars(model).get("generate")
        if hasattr(model, "generate"):
            model.generate = self._announced(model.generate)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if outer is not None:
                model.generate = outer
            elif "generate" in vars(model):
                del model.generate

    @staticmethod
    def _owners(model: Any) -> list[nn.Module]:
        """The modules that are given token ids: a model, and what is in it besides its head."""
        return [model] if model.base_model is model else [model, model.base_model]

    def _take_ids(self, owner: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the token ids of a pass, which the decoder is given the embeddings of."""
        arguments = inspect.signature(owner.forward).bind_partial(*args, **kwargs).arguments
        if arguments.get("input_ids") is not None:
            self._given_ids = arguments["input_ids"]

    def _before_forward(self, owner: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = inspect.signature(owner.forward).bind_partial(*args, **kwargs).arguments
        cache = arguments.get("past_key_values")
        tokens = arguments.get("input_ids")
        self._ids, self._given_ids = self._given_ids if tokens is None else tokens, None
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        self._start = 0 if cache is None else int(cache.get_seq_length())
        self._length = tokens.shape[1]
        if self._start == 0 and (self._is_first or not self._generating):
            self._text += 1
        self._is_first = False
        if not self._fixed:
            self._begin()

    def _begin(self) -> None:
        """Set the prompt length if this forward pass is the first of its text."""
        end = self._start + self._length
        if self._given is not None:
            self._prompt_length = self._given if self._start == 0 else end
            self._given = None
        elif self._start == 0 and not self._generating:
            self._prompt_length = end

    def _announced(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._generating = self._is_first = True
            self._given = _prompt_length_of(*args, **kwargs)
            try:
                return generate(*args, **kwargs)
            finally:
                self._generating = self._is_first = False
                self._given = None

        return wrapper


def _prompt_length_of(inputs: Any = None, *_: Any, **kwargs: Any) -> int:
    """The tokens that ``generate`` is called with: a beginning-of-text token if there are none."""
    candidates = (
        kwargs.get("inputs_embeds"),
        kwargs.get("input_ids"),
        inputs,
        kwargs.get("inputs"),
    )
    tokens = next((tensor for tensor in candidates if tensor is not None), None)
    return 1 if tokens is None else int(tokens.shape[1])
