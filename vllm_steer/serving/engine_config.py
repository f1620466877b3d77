"""From a user's steer config to the plan inside ``VllmConfig``, and whether vLLM can carry it."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from vllm_steer.config import SteerConfig
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.families import family_of
from vllm_steer.kernels.dispatch import KernelError, backend
from vllm_steer.plan import PlannedSteer, SteerPlan, is_plan
from vllm_steer.serving.dynamic_admission import check_engine_for
from vllm_steer.serving.streams.stream import is_dynamic
from vllm_steer.steers.layers import format_layers

logger = logging.getLogger("vllm.vllm_steer")

OLDEST = Version("0.25.1")
NEWEST = Version("0.33")
_plans: dict[int, tuple[Any, SteerPlan]] = {}


def resolved_additional_config(additional_config: Any) -> dict[str, Any] | None:
    """``additional_config`` with its ``steer`` value resolved to a plan; None without one."""
    if not isinstance(additional_config, Mapping) or additional_config.get("steer") is None:
        return None
    steer = additional_config["steer"]
    plan = steer if is_plan(steer) else SteerPlan.of(SteerConfig.load(steer)).to_json()
    return {**additional_config, "steer": plan}


def plan_of(vllm_config: Any) -> SteerPlan | None:
    """The plan that an engine was started with, None for an engine without steers."""
    additional_config = vllm_config.additional_config
    if not isinstance(additional_config, Mapping) or not is_plan(additional_config.get("steer")):
        return None
    data = additional_config["steer"]
    if id(data) not in _plans:
        _plans[id(data)] = (data, SteerPlan.from_json(data))
    return _plans[id(data)][1]


def check_engine(vllm_config: Any) -> None:
    """Raise ``SteerError`` if the plan does not fit the model or a feature is in its way."""
    plan = plan_of(vllm_config)
    assert plan is not None
    _warn_of_version()
    _check_kernels(plan, vllm_config.device_config.device_type)
    inside = plan.sites != {"head"}
    refused = (*_REFUSED, *(_REFUSED_INSIDE if inside else ()))
    for is_on, name, way_out in refused:
        if is_on(vllm_config):
            raise SteerError(f"steering does not work with {name}; {way_out}")
    if inside:
        _check_family(plan, vllm_config.model_config)
    for name, steer in plan.steers.items():
        _check_steer(name, steer, vllm_config.model_config)
    _check_default(plan, vllm_config)


def num_layers(model_config: Any) -> int:
    """Decoder layers of the language model, over all pipeline stages."""
    return int(model_config.hf_text_config.num_hidden_layers)


def max_logits_rows(vllm_config: Any) -> int:
    """Rows that the LM head sees in one step at most: each request's next token and its drafts."""
    speculative = vllm_config.speculative_config
    drafts = 0 if speculative is None else int(speculative.num_speculative_tokens or 0)
    return int(vllm_config.scheduler_config.max_num_seqs) * (1 + drafts)


def encodes_only(vllm_config: Any) -> bool:
    """Whether the engine only encodes images or audio for other engines and runs no decoder."""
    transfer = getattr(vllm_config, "ec_transfer_config", None)
    return bool(transfer is not None and transfer.is_ec_producer and not transfer.is_ec_consumer)


def _check_default(plan: SteerPlan, vllm_config: Any) -> None:
    """Raise ``SteerError`` if the default's strengths are dynamic and the engine's cannot be."""
    doses = plan.doses(None)
    if not is_dynamic(doses):
        return
    try:
        check_engine_for(doses, plan, vllm_config)
    except SteerRequestError as error:
        raise SteerError(f"default: {error}") from None


def _check_kernels(plan: SteerPlan, device_type: str) -> None:
    """Raise ``SteerError`` if the kernels that were asked for cannot run on the engine's device."""
    try:
        backend(plan.kernels, torch.device(device_type))
    except KernelError as error:
        raise SteerError(str(error)) from error


def _check_steer(name: str, steer: PlannedSteer, model_config: Any) -> None:
    """Raise ``SteerError`` for a steer whose sizes are not the model's."""
    place, model = f"steer {name}: {steer.path}", f"the model {model_config.model}"
    vocab_size = model_config.get_vocab_size()
    if steer.vocab_size not in (None, vocab_size):
        raise SteerError(
            f"{place}: vocabulary size is {steer.vocab_size}; {model} has {vocab_size}"
        )
    what, wanted = "hidden size", model_config.get_hidden_size()
    if steer.site == "heads":
        what, wanted = "width of the heads", _heads_width(model_config)
    if steer.hidden_size not in (None, wanted):
        raise SteerError(f"{place}: {what} is {steer.hidden_size}; {model} has {wanted}")
    if steer.layers is not None and steer.layers[-1] >= num_layers(model_config):
        raise SteerError(
            f"{place}: layers are {format_layers(steer.layers)}; {model} has layers "
            f"0-{num_layers(model_config) - 1}; choose some with the key layers"
        )


def _heads_width(model_config: Any) -> int:
    """Width of all attention heads side by side, over all tensor-parallel ranks."""
    return int(model_config.hf_text_config.num_attention_heads * model_config.get_head_size())


def _check_family(plan: SteerPlan, model_config: Any) -> None:
    """Raise ``SteerError`` if the model has no known place for a site inside its layers."""
    family = family_of(model_config.hf_config.architectures or [])
    if family.input_norm is None and "attn_in" in plan.sites:
        raise SteerError(
            f"the model {model_config.model} has no norm before its attention: the site attn_in "
            "does not exist in it; resid, attn_out and heads do"
        )


def _warn_of_version() -> None:
    import vllm

    if not is_known_version(vllm.__version__):
        logger.warning(
            "vLLM %s is outside the range that vllm-steer is made for (%s to %s); "
            "the start-up checks decide whether it can serve.",
            vllm.__version__,
            OLDEST,
            NEWEST,
        )


def is_known_version(version: str) -> bool:
    """Whether this is a vLLM that vllm-steer is made for."""
    try:
        known = Version(version)
    except InvalidVersion:
        return False
    return known >= OLDEST and (known.major, known.minor) <= (NEWEST.major, NEWEST.minor)


def _adaptive_verification(vllm_config: Any) -> bool:
    speculative = vllm_config.speculative_config
    return bool(getattr(speculative, "enable_adaptive_verification", False))


# They see a request's tokens and its salt at most, never the keys of its blocks.
_TOKEN_HASHING = ("ExampleConnector", "FlexKV", "HF3FS", "LMCache")


def _token_hashing_connector(vllm_config: Any) -> bool:
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return False
    inner = (transfer.kv_connector_extra_config or {}).get("connectors", ())
    names = [transfer.kv_connector, *(child.get("kv_connector") for child in inner)]
    return any(str(name).startswith(_TOKEN_HASHING) for name in names)


_REFUSED: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: c.model_config.runner_type != "generate",
        "pooling models",
        "a steer changes generated text only",
    ),
    (
        lambda c: getattr(c.parallel_config, "prefill_context_parallel_size", 1) > 1,
        "prefill context parallelism",
        "set prefill_context_parallel_size to 1",
    ),
    (
        lambda c: bool(getattr(c.parallel_config, "use_ubatching", False)),
        "micro-batch overlap (DBO)",
        "leave enable_dbo off",
    ),
    (
        lambda c: bool(getattr(c.parallel_config, "enable_batch_sharded_sampling", False)),
        "batch-sharded sampling",
        "leave enable_batch_sharded_sampling off",
    ),
    (
        lambda c: bool(getattr(c.cache_config, "kv_sharing_fast_prefill", False)),
        "KV-sharing fast prefill",
        "leave kv_sharing_fast_prefill off",
    ),
    (
        _adaptive_verification,
        "adaptive verification of draft tokens",
        "leave enable_adaptive_verification off",
    ),
)

_REFUSED_INSIDE: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: bool(getattr(c.parallel_config, "use_sequence_parallel_moe", False)),
        "sequence-parallel mixture of experts: its ranks hold different tokens",
        "turn expert parallelism or data parallelism off, or steer at the LM head only",
    ),
    (
        lambda c: bool(getattr(c.compilation_config.pass_config, "enable_sp", False)),
        "sequence parallelism: its ranks hold different tokens",
        "leave enable_sp off, or steer at the LM head only",
    ),
    (
        _token_hashing_connector,
        "a KV connector that makes its own keys from tokens: it would mix steered and unsteered KV",
        "use one that takes vLLM's block hashes, or steer at the LM head only",
    ),
)
