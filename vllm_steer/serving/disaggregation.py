"""Disaggregated prefill: KV that another instance has computed must be steered as a request asks.

An instance that hands KV on adds a digest of the doses in it to the ``kv_transfer_params`` of its
output, which a proxy passes on. The instance that takes the KV compares it with the request's own.
No digest means KV that no steer has touched; an instance without a steer config sends none.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm_steer.compat import options
from vllm_steer.compat.patching import wrap
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.cache_key import SteeredSalt, prompt_len, steered_salt
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import RejectedSteer, argument, doses_of

DIGEST: Final = "vllm_steer_kv"
"""The key of ``kv_transfer_params`` that has the digest."""
_WITHOUT_PARAMETERS: Final = ("Mooncake",)
"""Connectors whose prefill side gives the proxy nothing to pass on."""
_ADVICE: Final = (
    "start the prefill instance with the same --steer-config, send it the same steer, and pass its "
    "kv_transfer_params on unchanged"
)


def kv_digest(salt: Any, num_tokens: int) -> str:
    """A digest of the doses in the KV of a request's first tokens; empty if there are none."""
    keys = salt.keys if isinstance(salt, SteeredSalt) else ()
    digests = sorted(key.digest for key in keys if key.position < num_tokens)
    return hashlib.sha256(",".join(digests).encode()).hexdigest()[:32] if digests else ""


def with_checked_kv(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """``InputProcessor.process_inputs``, whose request is checked by ``check_received_kv``."""
    request = original(processor, *args, **kwargs)
    plan = plan_of(processor.vllm_config)
    if plan is not None and request.sampling_params is not None:
        check_received_kv(request, plan, processor.vllm_config)
    return request


def send_digests(core: Any) -> None:
    """Make the scheduler of ``core`` add a digest to KV that it hands on."""
    if options.kv_transfer_config(core.vllm_config) is not None:
        wrap(core.scheduler, "_connector_finished", _with_digest, once=True)


def check_received_kv(request: Any, plan: SteerPlan, vllm_config: Any) -> None:
    """Check an admitted request whose prompt, or a part of it, another instance has computed.

    Raises ``RejectedSteer`` if its KV is not steered as this request asks.
    """
    received = argument(request.sampling_params, "kv_transfer_params")
    if not isinstance(received, Mapping) or passes_no_parameters(vllm_config):
        return
    takes_blocks_back = received.get("do_remote_decode") and received.get("remote_block_ids")
    if not received.get("do_remote_prefill") and not takes_blocks_back:
        return
    salt = steered_salt(request, doses_of(request.sampling_params, plan), plan)
    expected, found = kv_digest(salt, prompt_len(request)), received.get(DIGEST, "")
    if expected == found:
        return
    if not found:
        problem = "the prompt's KV was computed without the steer that this request asks for"
    elif not expected:
        problem = "the prompt's KV was computed with a steer, and this request asks for none in it"
    else:
        problem = "the prompt's KV was computed with another steer than this request asks for"
    raise RejectedSteer(f"{problem}; {_ADVICE}")


def passes_no_parameters(vllm_config: Any) -> bool:
    """Whether the engine's connector hands KV over without parameters for the proxy to pass on."""
    return str(options.kv_connector(vllm_config)).startswith(_WITHOUT_PARAMETERS)


def _with_digest(
    original: Callable[[Any], tuple[bool, dict[str, Any] | None]], request: Any
) -> tuple[bool, dict[str, Any] | None]:
    """``Scheduler._connector_finished``, whose parameters say how the request's KV is steered."""
    is_delayed, params = original(request)
    digest = kv_digest(request.cache_salt, request.num_computed_tokens)
    return is_delayed, {**params, DIGEST: digest} if params and digest else params
