"""Preprocesses a request in the engine core: admission, prefix-cache key, streams."""

from collections.abc import Callable
from typing import Any

from vllm_steer.doses import is_dynamic
from vllm_steer.serving.admission import (
    admit,
    admit_and_set_cache_key,
    reads_whole_prompt,
)
from vllm_steer.serving.disaggregation import check_received_kv, send_digests
from vllm_steer.serving.plan_agreement import require_checked
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.runtime.engine_core import arriving


def preprocess_request(original: Callable[..., Any], core: Any, request: Any) -> Any:
    """``EngineCore.preprocess_add_request`` for a request that may be steered.

    Raises ``RejectedSteer`` for a request that cannot be served; other requests are unaffected.
    """
    plan = plan_of(core.vllm_config)
    if plan is None or request.sampling_params is None:
        admit(request.sampling_params, core.vllm_config)
        return original(core, request)
    salt = request.cache_salt
    doses = admit_and_set_cache_key(request, core.vllm_config)
    if doses:
        require_checked(core)
    send_digests(core)
    check_received_kv(request, plan, core.vllm_config)
    with arriving(core, request):
        if not is_dynamic(doses):
            arrived = original(core, request)
            if reads_whole_prompt(doses, plan):
                arrived[0].skip_reading_prefix_cache = True  # a hit has no hidden states to read
            return arrived
        from vllm_steer.serving.dynamic.stream_requests import preprocess_dynamic

        return preprocess_dynamic(original, core, request, salt, doses, plan)
