"""Fields of vLLM's configuration, each read by one function that knows where it is.

A field that a vLLM version should have and has not is an error: a check that reads ``False`` for
an option that vLLM has renamed would never refuse anything again.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from vllm_steer.compat.versions import SUPPORTED, installed_version
from vllm_steer.compat.vllm_name import Feature, VllmName
from vllm_steer.errors import SteerError

_MISSING: Final = object()


@dataclass(frozen=True)
class Option:
    """One field of one class of ``vllm.config``.

    ``section`` is where ``VllmConfig`` has the class's object, empty for ``VllmConfig`` itself.
    ``default`` is what holds where the object is None, and in versions that lack the field.
    """

    section: str
    cls: str
    field: str
    default: Any = None
    feature: Feature = "steering"
    since: str | None = None
    until: str | None = None

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        return tuple(filter(None, self.section.split(".")))

    @property
    def name(self) -> VllmName:
        """The field among vLLM's names."""
        module, path = _MODULES[self.cls], f"{self.cls}.{self.field}"
        return VllmName(module, path, "read", self.feature, since=self.since, until=self.until)

    def __call__(self, vllm_config: Any) -> Any:
        """The field's value. Raises ``SteerError`` where it should be and is not."""
        part = vllm_config
        for name in self._parts:
            part = getattr(part, name, _MISSING)
            if part is None:
                return self.default
        value = getattr(part, self.field, _MISSING)
        if value is not _MISSING:
            return value
        if not self.name.is_in(installed_version()):
            return self.default
        raise SteerError(
            f"vLLM {installed_version()} has no {self.cls}.{self.field}, which decides whether it "
            f"can steer; vllm-steer supports vLLM {SUPPORTED}: install one of these versions"
        )


_MODULES: Final = {
    "VllmConfig": "vllm.config.vllm",
    "ModelConfig": "vllm.config.model",
    "ParallelConfig": "vllm.config.parallel",
    "SchedulerConfig": "vllm.config.scheduler",
    "CacheConfig": "vllm.config.cache",
    "SpeculativeConfig": "vllm.config.speculative",
    "KVTransferConfig": "vllm.config.kv_transfer",
    "ECTransferConfig": "vllm.config.ec_transfer",
    "CompilationConfig": "vllm.config.compilation",
    "PassConfig": "vllm.config.compilation",
    "DeviceConfig": "vllm.config.device",
}

additional_config: Final = Option("", "VllmConfig", "additional_config")
lora_config: Final = Option("", "VllmConfig", "lora_config")
speculative_config: Final = Option("", "VllmConfig", "speculative_config")
kv_transfer_config: Final = Option("", "VllmConfig", "kv_transfer_config")
use_v2_model_runner: Final = Option("", "VllmConfig", "use_v2_model_runner", False)

device_type: Final = Option("device_config", "DeviceConfig", "device_type")

model: Final = Option("model_config", "ModelConfig", "model")
runner_type: Final = Option("model_config", "ModelConfig", "runner_type")
dtype: Final = Option("model_config", "ModelConfig", "dtype")
hf_config: Final = Option("model_config", "ModelConfig", "hf_config")
hf_text_config: Final = Option("model_config", "ModelConfig", "hf_text_config")
_get_vocab_size: Final = Option("model_config", "ModelConfig", "get_vocab_size")
_get_hidden_size: Final = Option("model_config", "ModelConfig", "get_hidden_size")
_get_head_size: Final = Option("model_config", "ModelConfig", "get_head_size", feature="guidance")

prefill_context_parallel_size: Final = Option(
    "parallel_config", "ParallelConfig", "prefill_context_parallel_size", 1
)
use_ubatching: Final = Option("parallel_config", "ParallelConfig", "use_ubatching", False)
enable_batch_sharded_sampling: Final = Option(
    "parallel_config", "ParallelConfig", "enable_batch_sharded_sampling", False, since="0.29"
)
enable_elastic_ep: Final = Option(
    "parallel_config", "ParallelConfig", "enable_elastic_ep", False, "guidance"
)
enable_hc_sp: Final = Option(
    "parallel_config", "ParallelConfig", "enable_hc_sp", False, "guidance", since="0.32"
)
pipeline_parallel_size: Final = Option(
    "parallel_config", "ParallelConfig", "pipeline_parallel_size", 1, "dynamic strength"
)
data_parallel_size: Final = Option("parallel_config", "ParallelConfig", "data_parallel_size", 1)
nnodes: Final = Option("parallel_config", "ParallelConfig", "nnodes", 1)

max_num_seqs: Final = Option("scheduler_config", "SchedulerConfig", "max_num_seqs")
max_num_batched_tokens: Final = Option(
    "scheduler_config", "SchedulerConfig", "max_num_batched_tokens", feature="guidance"
)
max_num_active_seqs: Final = Option(
    "scheduler_config",
    "SchedulerConfig",
    "max_num_active_seqs",
    None,
    "dynamic strength",
    since="0.31",
)
prefill_schedule_interval: Final = Option(
    "scheduler_config", "SchedulerConfig", "prefill_schedule_interval", 1, "dynamic strength"
)

kv_sharing_fast_prefill: Final = Option(
    "cache_config", "CacheConfig", "kv_sharing_fast_prefill", False
)

num_speculative_tokens: Final = Option(
    "speculative_config", "SpeculativeConfig", "num_speculative_tokens"
)
enable_adaptive_verification: Final = Option(
    "speculative_config", "SpeculativeConfig", "enable_adaptive_verification", False, since="0.28"
)

kv_connector: Final = Option("kv_transfer_config", "KVTransferConfig", "kv_connector")
kv_connector_extra_config: Final = Option(
    "kv_transfer_config", "KVTransferConfig", "kv_connector_extra_config"
)
is_ec_producer: Final = Option("ec_transfer_config", "ECTransferConfig", "is_ec_producer", False)
is_ec_consumer: Final = Option("ec_transfer_config", "ECTransferConfig", "is_ec_consumer", False)

static_forward_context: Final = Option(
    "compilation_config", "CompilationConfig", "static_forward_context", feature="guidance"
)
max_cudagraph_capture_size: Final = Option(
    "compilation_config", "CompilationConfig", "max_cudagraph_capture_size", feature="guidance"
)
enable_sp: Final = Option(
    "compilation_config.pass_config", "PassConfig", "enable_sp", False, "guidance", until="0.32"
)

OPTIONS: Final = tuple(value for value in list(globals().values()) if isinstance(value, Option))
SECTIONS: Final = tuple(
    VllmName("vllm.config.compilation", "CompilationConfig.pass_config", "read", "guidance")
    if "." in section
    else VllmName("vllm.config.vllm", f"VllmConfig.{section}", "read", "steering")
    for section in sorted({o.section for o in OPTIONS} - {"", *(o.field for o in OPTIONS)})
)
"""Where ``VllmConfig`` has the objects of the other classes."""


def vocab_size(vllm_config: Any) -> int:
    """Tokens of the model's vocabulary."""
    return int(_get_vocab_size(vllm_config)())


def hidden_size(vllm_config: Any) -> int:
    """Width of the residual stream."""
    return int(_get_hidden_size(vllm_config)())


def heads_width(vllm_config: Any) -> int:
    """Width of all attention heads side by side, over all tensor-parallel ranks."""
    heads = hf_text_config(vllm_config).num_attention_heads
    return int(heads * _get_head_size(vllm_config)())


def num_layers(vllm_config: Any) -> int:
    """Decoder layers of the language model, over all pipeline stages."""
    return int(hf_text_config(vllm_config).num_hidden_layers)


def architectures(vllm_config: Any) -> list[str]:
    """The model's classes, as its config names them."""
    return list(hf_config(vllm_config).architectures or [])


def max_logits_rows(vllm_config: Any) -> int:
    """Rows that the LM head sees in one step at most: each request's next token and its drafts."""
    return int(max_num_seqs(vllm_config)) * (1 + int(num_speculative_tokens(vllm_config) or 0))


def max_requests_at_once(vllm_config: Any) -> int:
    """Requests that the scheduler runs at once; older vLLM versions have only one limit."""
    active = max_num_active_seqs(vllm_config)
    return int(max_num_seqs(vllm_config) if active is None else active)


def encodes_only(vllm_config: Any) -> bool:
    """Whether the engine only encodes images or audio for other engines and runs no decoder."""
    return bool(is_ec_producer(vllm_config) and not is_ec_consumer(vllm_config))
