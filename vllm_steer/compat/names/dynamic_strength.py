"""Names that dynamic strength needs: the scheduler, and the outputs that carry strengths."""

from vllm_steer.compat.vllm_name import vllm_names

GLOBAL = (
    *vllm_names(
        "vllm.v1.engine.core:EngineCore",
        "add_request",
        "wrapped",
        "dynamic strength",
        "a request's streams enter the scheduler; its loaded steers stay until it has ended",
        process="engine core",
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "process_outputs",
        "wrapped",
        "dynamic strength",
        "strengths are taken off the engine's outputs",
        process="frontend",
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:RequestState",
        "_new_completion_output",
        "wrapped",
        "dynamic strength",
        "strengths are put on the user's outputs",
        process="frontend",
    ),
)
"""Wrapped on classes, for all engines of a process."""

OTHER = (
    *vllm_names(
        "vllm.v1.outputs:AsyncModelRunnerOutput",
        "get_output",
        "wrapped",
        "dynamic strength",
        "strengths beside the step's tokens",
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "schedule update_from_output finish_requests",
        "wrapped",
        "dynamic strength",
        "schedules the streams of a request",
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "_handle_blocked_waiting_request",
        "wrapped",
        "dynamic strength",
        "whether a waiting request may be scheduled",
        since="0.31",
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "_try_promote_blocked_waiting_request",
        "wrapped",
        "dynamic strength",
        "whether a waiting request may be scheduled",
        until="0.31",
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "_is_blocked_waiting_status",
        "wrapped",
        "dynamic strength",
        "before 0.31: every waiting request is asked about",
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:RequestOutputCollector",
        "put get get_nowait",
        "subclassed",
        "dynamic strength",
        "outputs that are merged keep their strengths",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "requests",
        "written",
        "dynamic strength",
        process="V1",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "req_states",
        "read",
        "dynamic strength",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.states:RequestState",
        "req_id_to_index",
        "read",
        "dynamic strength",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu.states:RequestState",
        "last_sampled_tokens",
        "written",
        "dynamic strength",
        process="V2",
    ),
    *vllm_names(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "output_token_ids",
        "written",
        "dynamic strength",
        process="V1",
    ),
    *vllm_names("vllm.v1.outputs:ModelRunnerOutput", "req_id_to_index", "read", "dynamic strength"),
    *vllm_names(
        "vllm.v1.outputs:ModelRunnerOutput", "sampled_token_ids", "written", "dynamic strength"
    ),
    *vllm_names(
        "vllm.sampling_params:SamplingParams",
        "prompt_logprobs max_tokens skip_reading_prefix_cache",
        "read",
        "dynamic strength",
    ),
    *vllm_names(
        "vllm.v1.request:Request",
        (
            "status num_output_tokens output_token_ids num_computed_tokens "
            "num_tokens client_index arrival_time trace_headers"
        ),
        "read",
        "dynamic strength",
    ),
    *vllm_names(
        "vllm.v1.request:Request", "num_output_placeholders", "written", "dynamic strength"
    ),
    *vllm_names(
        "vllm.v1.request:Request",
        "append_output_token_ids is_finished take_events take_prefill_stats",
        "called",
        "dynamic strength",
    ),
    *vllm_names(
        "vllm.v1.request:Request",
        "num_stale_output_tokens",
        "read",
        "dynamic strength",
        since="0.27",
    ),
    *vllm_names(
        "vllm.v1.request:RequestStatus",
        "RUNNING WAITING PREEMPTED FINISHED_ABORTED FINISHED_ERROR",
        "read",
        "dynamic strength",
    ),
    *vllm_names(
        "vllm.v1.core.sched.interface:PauseState", "PAUSED_NEW", "read", "dynamic strength"
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "add_request _preempt_request",
        "called",
        "dynamic strength",
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        (
            "requests running pause_state "
            "max_num_running_reqs deferred_frees num_waiting_for_streaming_input"
        ),
        "read",
        "dynamic strength",
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "max_num_active_reqs",
        "read",
        "dynamic strength",
        since="0.31",
    ),
    *vllm_names(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "skipped_waiting",
        "read",
        "dynamic strength",
        until="0.31",
    ),
    *vllm_names("vllm.v1.engine", "EngineCoreOutputs FinishReason", "called", "dynamic strength"),
    *vllm_names(
        "vllm.v1.engine:EngineCoreOutput",
        "request_id new_token_ids finish_reason stop_reason events trace_headers",
        "read",
        "dynamic strength",
    ),
    *vllm_names(
        "vllm.v1.engine:EngineCoreOutput", "kv_transfer_params", "written", "dynamic strength"
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:RequestState",
        "external_req_id parent_req output_kind queue",
        "read",
        "dynamic strength",
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:RequestOutputCollector",
        "output aggregate",
        "read",
        "dynamic strength",
    ),
    *vllm_names("vllm.outputs:RequestOutput", "outputs", "read", "dynamic strength"),
    *vllm_names("vllm.outputs:CompletionOutput", "index token_ids", "read", "dynamic strength"),
    *vllm_names("vllm.sampling_params:SamplingParams", "n", "read", "dynamic strength"),
)
