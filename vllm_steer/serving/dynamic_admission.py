"""Refuses requests with dynamic strength that the engine or their parameters rule out."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_steer.compat import options
from vllm_steer.compat.features import why_unavailable
from vllm_steer.doses import Dose
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.dynamic.streams import needs_streams, num_streams
from vllm_steer.steers.sites import acts_at_head

_INSTEAD = "or give the steers fixed strengths"


def check_engine_for(doses: Sequence[Dose], plan: SteerPlan, vllm_config: Any) -> None:
    """Raise ``SteerRequestError`` if an engine cannot serve doses some of which are dynamic."""
    in_streams = needs_streams(doses, plan)
    for is_on, name, way_out in (*_REFUSED, *(_REFUSED_IN_STREAMS if in_streams else ())):
        if is_on(vllm_config):
            raise _not_with(name, f"{way_out}, {_INSTEAD}")
    if options.lora_config(vllm_config) is not None and _any_at_head(doses, plan):
        raise _not_with(
            "LoRA for a steer at the LM head: its unsteered and probing rows there are none of a "
            "request's own and would go without the adapter",
            "restart without enable_lora, ask for a steer inside the layers, " + _INSTEAD,
        )
    check_served(_INSTEAD)
    wanted, seats = num_streams(doses, plan), options.max_requests_at_once(vllm_config)
    if wanted > seats:
        raise SteerRequestError(
            f"the dynamic strengths need {wanted} streams side by side and the engine runs "
            f"{seats} requests at once; ask for fewer dynamic steers, or restart with "
            f"--max-num-seqs {wanted} or more"
        )


def check_served(way_out: str) -> None:
    """Raise ``SteerRequestError`` if the installed vLLM cannot serve dynamic strength at all."""
    if reason := why_unavailable("dynamic strength"):
        raise SteerRequestError(f"dynamic strength is not available: {reason}; {way_out}")


def check_params_for(doses: Sequence[Dose], params: Any) -> None:
    """Raise ``SteerRequestError`` if sampling parameters do not go together with dynamic doses."""
    from vllm import SamplingParams

    names = ", ".join(dose.steer for dose in doses if dose.dynamic)
    if not isinstance(params, SamplingParams):
        raise SteerRequestError(
            f"dynamic strength ({names}) belongs to generated text and the request has "
            f"{type(params).__name__}; generate with SamplingParams, or ask for steer 'none'"
        )
    if params.prompt_logprobs is not None:
        raise SteerRequestError(
            f"dynamic strength ({names}) begins with the first token after the prompt, hence there "
            f"are no prompt logprobs under it; leave prompt_logprobs away, {_INSTEAD}"
        )


def check_input_for(doses: Sequence[Dose], plan: SteerPlan, request: Any) -> None:
    """Raise ``SteerRequestError`` for a prompt that a request's streams cannot share."""
    if getattr(request, "resumable", False):
        raise _not_with("streaming input, whose prompt grows", "send the whole prompt")
    if not needs_streams(doses, plan):
        return
    if getattr(request, "prompt_embeds", None) is not None:
        raise _not_with("prompt embeddings", "send text or token ids, " + _INSTEAD)
    if getattr(request, "mm_features", None):
        raise _not_with("images, audio or video in the prompt", "send text only, " + _INSTEAD)


def _not_with(name: str, way_out: str) -> SteerRequestError:
    return SteerRequestError(f"dynamic strength does not work with {name}; {way_out}")


def _any_at_head(doses: Sequence[Dose], plan: SteerPlan) -> bool:
    return any(dose.dynamic and acts_at_head(plan.steers[dose.steer]) for dose in doses)


def _prefills_are_spaced(vllm_config: Any) -> bool:
    """Whether a scheduler without data parallelism admits prompts in some of its steps only."""
    interval = int(options.prefill_schedule_interval(vllm_config))
    return interval > 1 and options.data_parallel_size(vllm_config) == 1


_REFUSED: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: options.speculative_config(c) is not None,
        "speculative decoding: a strength is known only once the token before it is",
        "restart without a draft model",
    ),
)

_REFUSED_IN_STREAMS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: options.pipeline_parallel_size(c) > 1,
        "pipeline parallelism: only the last stage would know the strengths",
        "restart with pipeline_parallel_size 1",
    ),
    (
        lambda c: options.kv_transfer_config(c) is not None,
        "a KV connector, which knows nothing of a request's streams",
        "restart without kv_transfer_config",
    ),
    (
        # From 0.33 on the scheduler counts the steps between prompts by itself, and only those in
        # which something runs. None does where streams wait for one that has lost its blocks.
        _prefills_are_spaced,
        "prompts that wait for other steps, for streams wait for each other's prompts",
        "restart with prefill_schedule_interval 1",
    ),
)
