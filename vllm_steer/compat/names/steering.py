"""Names that every steered engine needs."""

from vllm_steer.compat.vllm_name import vllm_names

GLOBAL = (
    *vllm_names(
        "vllm.engine.arg_utils:EngineArgs",
        "add_cli_args",
        "wrapped",
        "steering",
        "the flag",
        process="frontend",
    ),
    *vllm_names(
        "vllm.engine.arg_utils:EngineArgs",
        "create_engine_config",
        "wrapped",
        "steering",
        "a config becomes a resolved plan",
        process="frontend",
    ),
    *vllm_names(
        "vllm.v1.engine.input_processor:InputProcessor",
        "_validate_params",
        "wrapped",
        "steering",
        "a bad request fails at admission",
        process="frontend",
    ),
    *vllm_names(
        "vllm.v1.engine.llm_engine:LLMEngine",
        "__init__",
        "wrapped",
        "steering",
        "the output processor knows the plan; requests are counted by steer",
        process="frontend",
    ),
    *vllm_names(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "__init__",
        "wrapped",
        "steering",
        "the output processor knows the plan; requests are counted by steer",
        process="frontend",
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "add_request",
        "wrapped",
        "steering",
        "what steers a request, and whether it asks for its strengths",
        process="frontend",
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:RequestState",
        "_new_request_output",
        "wrapped",
        "steering",
        "what has steered an output",
        process="frontend",
    ),
    *vllm_names(
        "vllm.v1.engine.core:EngineCore",
        "preprocess_add_request",
        "wrapped",
        "steering",
        "admission for other frontends, and the prefix-cache key",
        process="engine core",
    ),
    *vllm_names(
        "vllm.v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        "wrapped",
        "steering",
        "keys of the blocks that steers change",
        process="engine core",
    ),
    *vllm_names(
        "vllm.v1.core.block_pool",
        "generate_block_hash_extra_keys",
        "wrapped",
        "steering",
        "the copy that this module has imported",
        process="engine core",
    ),
    *vllm_names(
        "vllm.v1.simple_kv_offload.manager",
        "generate_block_hash_extra_keys",
        "wrapped",
        "steering",
        "the copy that this module has imported",
        process="engine core",
        since="0.30",
    ),
    *vllm_names(
        "vllm.v1.worker.worker_base:WorkerWrapperBase",
        "init_device",
        "wrapped",
        "steering",
        "banks, model and runner, on their instances",
        process="workers",
    ),
)
"""Wrapped on classes and in modules, for all engines of a process."""

OTHER = (
    *vllm_names(
        "vllm.v1.worker.gpu_worker:Worker",
        "load_model",
        "wrapped",
        "steering",
        "banks are filled once the model is loaded",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_worker:Worker",
        "compile_or_warm_up_model",
        "wrapped",
        "steering",
        "proof that every site is reached",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_worker:Worker",
        "reload_weights finish_weight_update",
        "wrapped",
        "steering",
        "directions at heads follow the model's weights",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "execute_model sample_tokens",
        "wrapped",
        "steering",
        "a step begins, and ends",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "_prepare_inputs",
        "wrapped",
        "steering",
        "the rows of a step",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "_dummy_run",
        "wrapped",
        "steering",
        "a pass without requests",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "execute_model sample_tokens",
        "wrapped",
        "steering",
        "a step begins, and ends",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "prepare_inputs",
        "wrapped",
        "steering",
        "the rows of a step",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "get_supported_tasks",
        "wrapped",
        "steering",
        "data-parallel engines must have the frontend's plan; what was loaded before a restart is "
        "loaded again",
        process="frontend",
    ),
    *vllm_names(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "engine_core output_processor vllm_config",
        "read",
        "steering",
    ),
    *vllm_names(
        "vllm.v1.engine.llm_engine:LLMEngine", "output_processor vllm_config", "read", "steering"
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:OutputProcessor", "request_states", "read", "steering"
    ),
    *vllm_names(
        "vllm.v1.engine.core_client:AsyncMPClient", "call_utility_async", "called", "steering"
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "_connector_finished",
        "wrapped",
        "steering",
        "a digest of the steers in KV that is handed to another instance",
        process="the instance",
    ),
    *vllm_names(
        "vllm.v1.engine.input_processor:InputProcessor",
        "process_inputs",
        "wrapped",
        "steering",
        "a request carries the keys of steers that were loaded at run time; a prompt that another "
        "instance has computed is steered as the request asks",
        process="frontend",
    ),
    *vllm_names(
        "vllm.exceptions",
        "VLLMValidationError",
        "subclassed",
        "steering",
        "a refused request is HTTP 400",
    ),
    *vllm_names("vllm.engine.arg_utils:EngineArgs", "additional_config", "written", "steering"),
    *vllm_names("vllm.v1.engine.input_processor:InputProcessor", "vllm_config", "read", "steering"),
    *vllm_names("vllm.v1.engine.core:EngineCore", "vllm_config scheduler", "read", "steering"),
    *vllm_names("vllm.v1.worker.worker_base:WorkerWrapperBase", "worker", "read", "steering"),
    *vllm_names("vllm.v1.worker.gpu_worker:Worker", "vllm_config model_runner", "read", "steering"),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "get_model",
        "called",
        "steering",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "model device input_batch query_start_loc positions",
        "read",
        "steering",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "model_memory_usage",
        "written",
        "steering",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "get_model _dummy_run",
        "called",
        "steering",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "model device",
        "read",
        "steering",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "model_memory_usage",
        "written",
        "steering",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "sample",
        "read",
        "steering",
        "it computes the logits",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        ("req_ids cu_num_logits_np num_scheduled_tokens query_start_loc positions num_tokens"),
        "read",
        "steering",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_input_batch:InputBatch", "req_ids", "read", "steering", process="V1"
    ),
    *vllm_names(
        "vllm.v1.core.sched.output:SchedulerOutput",
        ("scheduled_new_reqs finished_req_ids num_scheduled_tokens total_num_scheduled_tokens"),
        "read",
        "steering",
    ),
    *vllm_names(
        "vllm.v1.core.sched.output:NewRequestData",
        "req_id sampling_params prompt_token_ids prompt_embeds mm_features",
        "read",
        "steering",
    ),
    *vllm_names("vllm.distributed.parallel_state", "get_pp_group", "called", "steering"),
    *vllm_names(
        "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration",
        "compute_logits",
        "wrapped",
        "steering",
        "steers of the hidden state; every model has its own",
    ),
    *vllm_names(
        "vllm.distributed.parallel_state:GroupCoordinator", "is_last_rank", "read", "steering"
    ),
    *vllm_names("vllm.sampling_params:SamplingParams", "extra_args", "read", "steering"),
    *vllm_names(
        "vllm.v1.request:Request",
        "request_id sampling_params prompt_token_ids prompt_embeds mm_features resumable",
        "read",
        "steering",
    ),
    *vllm_names(
        "vllm.multimodal.inputs:MultiModalFeatureSpec", "modality mm_position", "read", "guidance"
    ),
    *vllm_names(
        "vllm.multimodal.inputs:PlaceholderRange", "offset length is_embed", "read", "guidance"
    ),
    *vllm_names("vllm.v1.request:Request", "cache_salt", "written", "steering"),
    *vllm_names("vllm.v1.request:Request", "skip_reading_prefix_cache", "written", "guidance"),
    *vllm_names(
        "vllm.v1.engine:EngineCoreRequest",
        "request_id sampling_params prompt_token_ids prompt_embeds mm_features resumable",
        "read",
        "steering",
    ),
    *vllm_names("vllm.v1.engine:EngineCoreRequest", "cache_salt", "written", "steering"),
    *vllm_names(
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata", "num_draft_tokens", "read", "steering"
    ),
    *vllm_names(
        "vllm.engine.arg_utils:EngineArgs",
        "model served_model_name speculative_config",
        "written",
        "steering",
    ),
)
