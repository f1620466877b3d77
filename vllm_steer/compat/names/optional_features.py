"""Names that single features need: some sites, HTTP, LoRA, commands."""

from collections.abc import Iterator

from vllm_steer.compat.vllm_name import VllmName, vllm_names


def _run_batch(module: str, **versions: str) -> Iterator[VllmName]:
    """The names of ``vllm run-batch``, which has moved."""
    yield from vllm_names(
        module,
        "run_batch",
        "wrapped",
        "HTTP",
        "the plan of the engine that runs a batch file",
        process="frontend",
        **versions,
    )
    yield from vllm_names(
        module,
        "run_request",
        "wrapped",
        "HTTP",
        "a line of a batch file that is steered or refused",
        process="frontend",
        **versions,
    )
    yield from vllm_names(
        module,
        "BatchRequestInput",
        "subclassed",
        "HTTP",
        "steer fields of a line are moved before it is parsed",
        process="a subclass",
        **versions,
    )


OTHER = (
    *vllm_names("vllm", "LLM SamplingParams", "called", "command line tools"),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "_get_prompt_logprobs_dict",
        "wrapped",
        "prompt logprobs",
        "the rows of prompts",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker",
        "compute_prompt_logprobs",
        "wrapped",
        "prompt logprobs",
        "the rows of prompts",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker",
        "compute_prompt_token_id_logprobs",
        "wrapped",
        "prompt logprobs",
        "the rows of prompts",
        process="V2",
        since="0.31",
    ),
    *vllm_names(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor",
        "_get_logits",
        "wrapped",
        "offset steers",
        "what the LM head gives, before soft cap and scale",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "lora_manager",
        "called",
        "LoRA",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "prompt_logprobs_worker",
        "read",
        "prompt logprobs",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "speculative_config",
        "written",
        "guidance",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "speculator",
        "written",
        "guidance",
        process="V2",
    ),
    *vllm_names("vllm.model_executor.models.utils", "PPMissingLayer", "read", "guidance"),
    *vllm_names(
        "vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase", "read", "guidance"
    ),
    *vllm_names("vllm.model_executor.layers.linear", "LinearBase", "read", "guidance"),
    *vllm_names("vllm.distributed.parallel_state", "get_tp_group", "called", "guidance"),
    *vllm_names(
        "vllm.compilation.decorators:_support_torch_compile",
        "do_not_compile",
        "written",
        "guidance",
    ),
    *vllm_names(
        "vllm.distributed.parallel_state:GroupCoordinator",
        "world_size cpu_group",
        "read",
        "guidance",
    ),
    *vllm_names(
        "vllm.model_executor.models.interfaces:SupportsMultiModal",
        "get_language_model",
        "called",
        "guidance",
    ),
    *vllm_names(
        "vllm.model_executor.layers.linear:RowParallelLinear",
        "input_size input_size_per_partition tp_rank",
        "read",
        "guidance",
    ),
    *vllm_names(
        "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA", "base_layer", "read", "LoRA"
    ),
    *vllm_names("vllm.forward_context", "get_forward_context", "called", "guidance"),
    *vllm_names("vllm.forward_context:ForwardContext", "no_compile_layers", "read", "guidance"),
    *vllm_names(
        "vllm.utils.torch_utils",
        "LayerNameType _encode_layer_name _resolve_layer_name direct_register_custom_op",
        "called",
        "guidance",
    ),
    *vllm_names("vllm.lora.layers", "LoRAMapping", "called", "LoRA"),
    *vllm_names(
        "vllm.lora.worker_manager:WorkerLoRAManager", "set_active_adapters", "called", "LoRA"
    ),
    *vllm_names("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest", "read", "HTTP"),
    *vllm_names(
        "vllm.entrypoints.llm:LLM",
        "generate get_tokenizer llm_engine",
        "called",
        "command line tools",
    ),
    *vllm_names(
        "vllm.distributed.parallel_state",
        "cleanup_dist_env_and_memory",
        "called",
        "command line tools",
    ),
    *vllm_names("vllm.platforms", "current_platform", "called", "command line tools"),
    *vllm_names("vllm.engine.protocol:EngineClient", "vllm_config", "read", "HTTP"),
    *vllm_names("vllm.engine.protocol:EngineClient", "collective_rpc", "called", "HTTP"),
    *_run_batch("vllm.entrypoints.openai.run_batch", until="0.29"),
    *_run_batch("vllm.entrypoints.launchers.run_batch", since="0.29"),
)
