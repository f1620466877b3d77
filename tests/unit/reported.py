"""The output side of an engine: requests, and tokens with their strengths."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

FINAL, DELTA, CUMULATIVE = (
    RequestOutputKind.FINAL_ONLY,
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
)
DYNAMIC = "a:dynamic:1.5"


def request(name: str, params: SamplingParams) -> EngineCoreRequest:
    """A request as from vLLM's input processor: with an internal id besides the user's."""
    return EngineCoreRequest(
        request_id=f"{name}-internal",
        external_req_id=name,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def params(kind: RequestOutputKind = FINAL, *, n: int = 1, **fields: Any) -> SamplingParams:
    """Of a request with a dynamic dose that asks for its strengths."""
    fields.setdefault("extra_args", {"steer": DYNAMIC, "steer_strengths": True})
    return SamplingParams(output_kind=kind, n=n, max_tokens=100, **fields)


def add(
    processor: OutputProcessor,
    sampling_params: SamplingParams,
    *,
    name: str = "r",
    queue: RequestOutputCollector | None = None,
) -> list[str]:
    """Give a request to the processor as ``AsyncLLM`` does; its sequences' own names."""
    whole = request(name, sampling_params)
    if sampling_params.n == 1:
        processor.add_request(whole, None, None, 0, queue)
        return [whole.request_id]
    parent = ParentRequest(whole)
    names = []
    for index in range(sampling_params.n):
        child = copy(whole)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        processor.add_request(child, None, parent, index, queue)
        names.append(child.request_id)
    return names


def step(
    processor: OutputProcessor,
    tokens: Mapping[str, tuple[int, float | None]],
    *,
    last: Sequence[str] = (),
    reason: FinishReason = FinishReason.LENGTH,
) -> Any:
    """One engine step: by sequence its token and the strength of steer ``a``, if it has one."""
    outputs = [
        EngineCoreOutput(
            request_id=name,
            new_token_ids=[token],
            finish_reason=reason if name in last else None,
            kv_transfer_params=None if strength is None else carried({"a": strength}),
        )
        for name, (token, strength) in tokens.items()
    ]
    return processor.process_outputs(outputs)


def carried(strengths: dict[str, float]) -> dict[str, Any]:
    return {"vllm_steer": {"strengths": strengths}}


def generate(
    processor: OutputProcessor,
    name: str,
    strengths: Sequence[float | None],
    *,
    reason: FinishReason = FinishReason.LENGTH,
) -> list[Any]:
    """All steps of one sequence; the outputs that they return to a user without a queue."""
    returned = []
    for at, strength in enumerate(strengths):
        last = [name] if at + 1 == len(strengths) else []
        step_ = step(processor, {name: (10 + at, strength)}, last=last, reason=reason)
        returned += step_.request_outputs
    return returned
