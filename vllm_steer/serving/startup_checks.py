"""Start-up checks: the plan must fit the model, and no feature may be incompatible."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from vllm_steer.compat import options
from vllm_steer.compat.versions import SUPPORTED, installed_version, is_supported
from vllm_steer.doses import is_dynamic
from vllm_steer.errors import SteerError, SteerRequestError
from vllm_steer.families import FAMILIES, check_supported, family_of, is_compared
from vllm_steer.kernels.dispatch import KernelError, resolve_kernels
from vllm_steer.plan import PlannedSteer, SteerPlan
from vllm_steer.serving.disaggregation import passes_no_parameters
from vllm_steer.serving.dynamic_admission import check_engine_for
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.steers.layers import format_layers

logger = logging.getLogger("vllm.vllm_steer")


def check_engine(vllm_config: Any) -> None:
    """Raise ``SteerError`` if the plan does not fit the model or a feature is incompatible."""
    plan = plan_of(vllm_config)
    assert plan is not None
    _warn_of_version()
    _check_kernels(plan, options.device_type(vllm_config))
    inside = bool(plan.layer_sites)
    refused = (*_INCOMPATIBLE, *(_INCOMPATIBLE_INSIDE_LAYERS if inside else ()))
    for is_on, name, advice in refused:
        if is_on(vllm_config):
            raise SteerError(f"steering does not work with {name}; {advice}")
    if inside:
        _check_family(plan, vllm_config)
        _warn_of_unchecked_kv(vllm_config)
    if plan.has_conditions:
        for is_on, name, advice in _INCOMPATIBLE_WITH_CONDITIONS:
            if is_on(vllm_config):
                raise SteerError(f"conditions do not work with {name}; {advice}")
    has_room = plan.runtime.enabled and plan.runtime.room.has_maps
    if has_room or any(steer.kind == "low_rank" for steer in plan.steers.values()):
        _check_maps(plan, vllm_config)
    for name, steer in plan.steers.items():
        check_steer(name, steer, vllm_config)
    _check_default(plan, vllm_config)
    if plan.runtime.enabled:
        _check_runtime(plan, vllm_config)


def can_be_dynamic(vllm_config: Any) -> bool:
    """True if requests of this engine may use dynamic strength."""
    return options.speculative_config(vllm_config) is None


def _check_runtime(plan: SteerPlan, vllm_config: Any) -> None:
    """Raise ``SteerError`` if steers cannot be loaded while this engine serves."""
    runtime = plan.runtime
    if int(options.nnodes(vllm_config)) > 1:
        raise SteerError(
            "runtime: steers cannot be loaded while several nodes serve one engine: their workers "
            "would have to read the same files; serve on one node, or name all steers in the config"
        )
    for name, folder in (("state", runtime.state), *(("folders", f) for f in runtime.folders)):
        if folder is not None and not folder.is_dir():
            raise SteerError(f"runtime.{name}: {folder} is no folder; make it first")


def _check_default(plan: SteerPlan, vllm_config: Any) -> None:
    """Raise ``SteerError`` if the default's strengths are dynamic and the engine's cannot be."""
    doses = plan.doses(None)
    if not is_dynamic(doses):
        return
    try:
        check_engine_for(doses, plan, vllm_config)
    except SteerRequestError as error:
        raise SteerError(f"default: {error}") from None


def _check_maps(plan: SteerPlan, vllm_config: Any) -> None:
    """Raise ``SteerError`` if low-rank maps would have to be in a CUDA graph without Triton."""
    device = torch.device(options.device_type(vllm_config))
    in_graphs = device.type == "cuda" and options.max_cudagraph_capture_size(vllm_config)
    if in_graphs and resolve_kernels(plan.kernels, device) != "triton":
        raise SteerError(
            f"kernels is {plan.kernels}: low-rank maps in a CUDA graph need the Triton kernels; "
            "set kernels: auto, or start with --enforce-eager"
        )


def _check_kernels(plan: SteerPlan, device_type: str) -> None:
    """Raise ``SteerError`` if the kernels that were asked for cannot run on the engine's device."""
    try:
        resolve_kernels(plan.kernels, torch.device(device_type))
    except KernelError as error:
        raise SteerError(str(error)) from error


def check_steer(name: str, steer: PlannedSteer, vllm_config: Any) -> None:
    """Raise ``SteerError`` for a steer whose sizes are not the model's."""
    subject, model = f"steer {name}: {steer.path}", f"the model {options.model(vllm_config)}"
    vocab_size = options.vocab_size(vllm_config)
    if steer.vocab_size not in (None, vocab_size):
        raise SteerError(
            f"{subject}: vocabulary size is {steer.vocab_size}; {model} has {vocab_size}"
        )
    quantity, expected = "hidden size", options.hidden_size(vllm_config)
    if steer.site == "heads":
        if not set(options.architectures(vllm_config)) & set(FAMILIES):
            return  # its layers may differ: the worker compares each projection
        quantity, expected = "width of the heads", options.heads_width(vllm_config)
    if steer.hidden_size not in (None, expected):
        raise SteerError(f"{subject}: {quantity} is {steer.hidden_size}; {model} has {expected}")
    num_layers = options.num_layers(vllm_config)
    if steer.layers is not None and steer.layers[-1] >= num_layers:
        raise SteerError(
            f"{subject}: layers are {format_layers(steer.layers)}; {model} has layers "
            f"0-{num_layers - 1}; choose some with the key layers"
        )


def _check_family(plan: SteerPlan, vllm_config: Any) -> None:
    """Raise ``SteerError`` if the model is known to lack a site, or is not to be served untested.

    What its layers have is tested when its weights are loaded.
    """
    architectures = options.architectures(vllm_config)
    check_supported(architectures)
    if plan.untested == "warn" and not is_compared(architectures):
        return
    if family_of(architectures).input_norm is None and "attn_in" in plan.layer_sites:
        raise SteerError(
            f"the model {options.model(vllm_config)} has no norm before its attention: the site "
            "attn_in does not exist in it; resid, attn_out and heads do"
        )


def _warn_of_unchecked_kv(vllm_config: Any) -> None:
    if passes_no_parameters(vllm_config):
        logger.warning(
            "vllm-steer: %s hands KV over without parameters, so nothing compares the steers in it "
            "with those of a request: give all instances the same --steer-config, and send them "
            "the same steer.",
            options.kv_connector(vllm_config),
        )


def _warn_of_version() -> None:
    version = installed_version()
    if not is_supported(version):
        logger.warning(
            "vLLM %s is outside the range that vllm-steer supports (%s); the start-up checks "
            "decide whether it can serve.",
            version,
            SUPPORTED,
        )


# These connectors use the tokens and the salt of a request, not its block keys.
_TOKEN_HASHING = ("ExampleConnector", "FlexKV", "HF3FS", "LMCache")


def _token_hashing_connector(vllm_config: Any) -> bool:
    inner = (options.kv_connector_extra_config(vllm_config) or {}).get("connectors", ())
    names = [options.kv_connector(vllm_config), *(child.get("kv_connector") for child in inner)]
    return any(str(name).startswith(_TOKEN_HASHING) for name in names)


_INCOMPATIBLE: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: options.runner_type(c) != "generate",
        "pooling models",
        "a steer changes generated text only",
    ),
    (
        lambda c: options.prefill_context_parallel_size(c) > 1,
        "prefill context parallelism",
        "set prefill_context_parallel_size to 1",
    ),
    (
        options.use_ubatching,
        "micro-batch overlap (DBO)",
        "leave enable_dbo off",
    ),
    (
        options.enable_batch_sharded_sampling,
        "batch-sharded sampling",
        "leave enable_batch_sharded_sampling off",
    ),
    (
        options.kv_sharing_fast_prefill,
        "KV-sharing fast prefill",
        "leave kv_sharing_fast_prefill off",
    ),
    (
        options.enable_adaptive_verification,
        "adaptive verification of draft tokens",
        "leave enable_adaptive_verification off",
    ),
)

_INCOMPATIBLE_WITH_CONDITIONS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: options.pipeline_parallel_size(c) > 1,
        "pipeline parallelism: one stage reads the condition, and the others would not know",
        "set pipeline_parallel_size to 1, or remove the steers of kind condition and their room",
    ),
    (
        lambda c: options.kv_transfer_config(c) is not None,
        "a KV connector: the prompt may have been computed elsewhere",
        "start without kv_transfer_config, or remove the steers of kind condition and their room",
    ),
)

_INCOMPATIBLE_INSIDE_LAYERS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        options.enable_elastic_ep,
        "elastic expert parallelism: its engines come and go with weights that are copied later",
        "leave enable_elastic_ep off, or steer at the LM head only",
    ),
    (
        options.enable_sp,
        "sequence parallelism: its ranks hold different tokens",
        "leave enable_sp off, or steer at the LM head only",
    ),
    (
        options.enable_hc_sp,
        "sequence parallelism of hyper-connections: its ranks hold different tokens",
        "leave enable_hc_sp off, or steer at the LM head only",
    ),
    (
        _token_hashing_connector,
        "a KV connector that makes its own keys from tokens: it would mix steered and unsteered KV",
        "use one that takes vLLM's block hashes, or steer at the LM head only",
    ),
)
