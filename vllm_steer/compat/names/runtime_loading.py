"""Names that loading steers while an engine serves needs."""

from vllm_steer.compat.vllm_name import vllm_names

OTHER = (
    *vllm_names(
        "vllm.v1.engine.core_client:AsyncMPClient",
        "_call_utility_async core_engines",
        "called",
        "loading at run time",
    ),
    *vllm_names(
        "vllm.v1.engine.core_client:SyncMPClient", "call_utility", "called", "loading at run time"
    ),
    *vllm_names(
        "vllm.v1.engine.core_client:InprocClient", "engine_core", "read", "loading at run time"
    ),
    *vllm_names(
        "vllm.v1.engine.core:EngineCore", "collective_rpc", "called", "loading at run time"
    ),
    *vllm_names("vllm.v1.engine.async_llm:AsyncLLM", "errored", "read", "loading at run time"),
    *vllm_names("vllm.entrypoints.llm:LLM", "llm_engine", "read", "loading at run time"),
)
