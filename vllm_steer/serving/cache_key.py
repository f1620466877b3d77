"""Prefix-cache keys of requests whose steers change their KV.

KV depends on what a steer does to the tokens so far, so a block's key has to name every dose that
has acted by the end of the block: by content, never by name. vLLM chains block hashes, hence it is
enough to name a dose in the extra keys of the first block that it touches; the blocks before it
stay shared with everybody. What acts from the first token on also joins vLLM's own ``cache_salt``,
the one part of a key that is seen outside of vLLM's block hashes. A salt alone would not do: a user
may write any salt, that of a steered request too.

A gated dose acts or does not by what its conditions find in the prompt: a block after its beginning
depends on the prompt, which its key covers, on what else steers the prompt, likewise, and on the
conditions, which are named beside the dose.

A dynamic dose acts at strengths that were computed for one request alone: from the last prompt
token on its blocks are that request's own. The streams that they are computed from are keyed like
any request: a base by nothing, a probe by its one dose.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_steer.doses import END, Dose, token_spans
from vllm_steer.plan import PlannedSteer, SteerPlan
from vllm_steer.serving.placeholders import placeholder_bounds
from vllm_steer.steers.sites import acts_at_head


@dataclass(frozen=True)
class BlockKey:
    """A digest that enters the key of the block that holds token ``position``."""

    position: int
    digest: str


class SteeredSalt(str):
    """A request's ``cache_salt`` that also carries the keys of its steers."""

    keys: tuple[BlockKey, ...] = ()


def steered_salt(request: Any, doses: tuple[Dose, ...], plan: SteerPlan) -> str | None:
    """The request's own salt joined with what its doses do to KV; the own one if they do nothing.

    A steer at the head acts after the last layer: its requests share blocks with all others.
    """
    num_tokens = prompt_len(request)
    keys = [
        key
        for dose in doses
        if not acts_at_head(plan.steer_of(dose))
        for key in _keys(dose, plan, num_tokens, request)
    ]
    if not keys:
        user_salt: str | None = request.cache_salt
        return user_salt
    from_start = sorted(key.digest for key in keys if key.position == 0)
    salt = SteeredSalt(
        f"{request.cache_salt or ''}|steer:{','.join(from_start)}"
        if from_start
        else request.cache_salt or ""
    )
    salt.keys = tuple(sorted(keys, key=lambda key: key.digest))
    return salt


def with_steer_keys(
    original: Callable[..., Any],
    request: Any,
    start_token_idx: int,
    end_token_idx: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """vLLM's function from a block to its extra keys, with those of ``SteeredSalt.keys``."""
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, *args, **kwargs)
    salt = request.cache_salt
    if not isinstance(salt, SteeredSalt):
        return keys, next_mm_idx
    steer_keys = (
        ("steer", key.digest)
        for key in salt.keys
        if start_token_idx <= key.position < end_token_idx
    )
    return (*map(_plain, keys or ()), *steer_keys) or None, next_mm_idx


def _plain(key: Any) -> Any:
    """A key with the salt as an ordinary string: vLLM may hash keys by their pickle."""
    if isinstance(key, tuple):
        return tuple(map(_plain, key))
    return str(key) if isinstance(key, SteeredSalt) else key


def _keys(dose: Dose, plan: SteerPlan, num_prompt: int, request: Any) -> Iterator[BlockKey]:
    """Where KV begins to depend on a dose, and where it begins to depend on its end.

    Phase ``text`` is ``all`` up to the first placeholder after that, and steers no token that it
    leaves out. Which tokens these are follows from what vLLM keys by itself: the tokens, and each
    image, audio or video with its place.
    """
    steer = plan.steer_of(dose)
    spans = token_spans(dose, steer.steps, num_prompt)
    if not spans:
        return
    gate = _gate(dose, plan, num_prompt)
    first = spans[0][0]
    if dose.dynamic:
        # Ids may come again: then all that the strengths follow from has to be alike.
        request_parts = (request.request_id, dose.dynamic.top_p, dose.dynamic.kl)
        yield BlockKey(first, _digest(dose, steer, first, *request_parts))
        return
    if dose.phase == "text" and steer.steps is None:
        bounds = placeholder_bounds([dose], request.mm_features, num_prompt)
        first, left_out = _text_start(bounds)
        if left_out is not None:
            yield BlockKey(left_out, _digest(dose, steer, first, "text"))
        spans = ((first, END),)
    if steer.steps is not None:  # where its steps end follows from the steer and its schedule
        steps = [bound - (num_prompt - 1) for span in spans for bound in span]
        is_text = dose.phase == "text"  # it leaves out a step at a placeholder
        yield BlockKey(first, _digest(dose, steer, first, *steps, is_text, *gate))
        return
    for begin, end in spans:
        yield BlockKey(begin, _digest(dose, steer, begin, *gate))
        if end < END:
            yield BlockKey(end, _digest(dose, steer, begin, end, *gate))


def _gate(dose: Dose, plan: SteerPlan, num_prompt: int) -> tuple[str | int, ...]:
    """What decides whether a gated dose acts; nothing for another one.

    A verdict depends on where the prompt ends, which the beginning of a window does not say.
    """
    if dose.gate is None:
        return ()
    conditions = sorted(steer.content for steer in plan.conditions_of(dose.gate))
    return (num_prompt, dose.gate.needs, *conditions)


def _text_start(bounds: Sequence[int]) -> tuple[int, int | None]:
    """The first token of text, and the first placeholder after it; None if there is none."""
    if not bounds or bounds[0] > 0:
        return 0, bounds[0] if bounds else None
    return bounds[1], bounds[2] if len(bounds) > 2 else None


def _digest(dose: Dose, steer: PlannedSteer, *more: int | float | str) -> str:
    """Everything that decides what a dose does to a token: with its span, and with the request that
    a dynamic one belongs to.
    """
    effect = [
        steer.content,
        dose.strength,
        dose.layers or steer.layers,
        dose.schedule,
        dose.low,
        dose.high,
        *more,
    ]
    return hashlib.sha256(json.dumps(effect).encode()).hexdigest()[:32]


def prompt_len(request: Any) -> int:
    """Tokens of a request's prompt."""
    ids = request.prompt_token_ids
    return len(ids) if ids is not None else int(request.prompt_embeds.shape[0])
