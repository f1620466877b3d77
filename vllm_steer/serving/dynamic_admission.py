"""Refuses requests with dynamic strength that the engine or their parameters rule out."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm_steer.compat import options
from vllm_steer.compat.features import unavailable_reason
from vllm_steer.doses import Dose
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.dynamic.streams import needs_streams, num_streams
from vllm_steer.serving.request_args import asks_for_prompt_logprobs
from vllm_steer.steers.sites import acts_at_head

_OR_FIXED = "or give the steers fixed strengths"


def check_engine_for(doses: Sequence[Dose], plan: SteerPlan, vllm_config: Any) -> None:
    """Raise ``SteerRequestError`` if an engine cannot serve doses some of which are dynamic."""
    in_streams = needs_streams(doses, plan)
    for is_on, name, advice in (
        *_INCOMPATIBLE,
        *(_INCOMPATIBLE_WITH_STREAMS if in_streams else ()),
    ):
        if is_on(vllm_config):
            raise _incompatible(name, f"{advice}, {_OR_FIXED}")
    if options.lora_config(vllm_config) is not None and _any_at_head(doses, plan):
        raise _incompatible(
            "LoRA for a steer at the LM head: LoRA would not be applied to the extra LM-head "
            "rows that "
            "compute the strength",
            "restart without enable_lora, ask for a steer inside the layers, " + _OR_FIXED,
        )
    check_available(_OR_FIXED)
    num_needed, num_slots = num_streams(doses, plan), options.max_requests_at_once(vllm_config)
    if num_needed > num_slots:
        raise SteerRequestError(
            f"the dynamic strengths need {num_needed} streams at once and the engine runs "
            f"{num_slots} requests at once; ask for fewer dynamic steers, or restart with "
            f"--max-num-seqs {num_needed} or more"
        )


def check_available(advice: str) -> None:
    """Raise ``SteerRequestError`` if the installed vLLM cannot serve dynamic strength at all."""
    if reason := unavailable_reason("dynamic strength"):
        raise SteerRequestError(f"dynamic strength is not available: {reason}; {advice}")


def check_params_for(doses: Sequence[Dose], params: Any) -> None:
    """Raise ``SteerRequestError`` if sampling parameters do not go together with dynamic doses."""
    from vllm import SamplingParams

    names = ", ".join(dose.steer for dose in doses if dose.dynamic)
    if not isinstance(params, SamplingParams):
        raise SteerRequestError(
            f"dynamic strength ({names}) belongs to generated text and the request has "
            f"{type(params).__name__}; generate with SamplingParams, or ask for steer 'none'"
        )
    if asks_for_prompt_logprobs(params):
        raise SteerRequestError(
            f"dynamic strength ({names}) begins with the first token after the prompt, hence there "
            f"are no prompt logprobs under it; leave prompt_logprobs away, {_OR_FIXED}"
        )


def check_input_for(doses: Sequence[Dose], plan: SteerPlan, request: Any) -> None:
    """Raise ``SteerRequestError`` for a prompt that a request's streams cannot share."""
    if getattr(request, "resumable", False):
        raise _incompatible("streaming input, whose prompt grows", "send the whole prompt")
    if not needs_streams(doses, plan):
        return
    if getattr(request, "prompt_embeds", None) is not None:
        raise _incompatible("prompt embeddings", "send text or token ids, " + _OR_FIXED)
    if getattr(request, "mm_features", None):
        raise _incompatible("images, audio or video in the prompt", "send text only, " + _OR_FIXED)


def _incompatible(name: str, advice: str) -> SteerRequestError:
    return SteerRequestError(f"dynamic strength does not work with {name}; {advice}")


def _any_at_head(doses: Sequence[Dose], plan: SteerPlan) -> bool:
    return any(dose.dynamic and acts_at_head(plan.steer_of(dose)) for dose in doses)


def _prefills_are_spaced(vllm_config: Any) -> bool:
    """Whether a scheduler without data parallelism admits prompts in some of its steps only."""
    interval = int(options.prefill_schedule_interval(vllm_config))
    return interval > 1 and options.data_parallel_size(vllm_config) == 1


_INCOMPATIBLE: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: options.speculative_config(c) is not None,
        "speculative decoding: a strength is known only once the token before it is",
        "restart without a draft model",
    ),
)

_INCOMPATIBLE_WITH_STREAMS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
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
