"""Names that counting requests by steer needs: vLLM's output processor, in the frontend."""

from vllm_steer.compat.vllm_name import vllm_names

OTHER = (
    *vllm_names(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "add_request",
        "wrapped",
        "metrics",
        "what a request will be counted as",
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "_update_stats_from_finished abort_requests",
        "wrapped",
        "metrics",
        "a request has ended",
    ),
    *vllm_names(
        "vllm.v1.engine.output_processor:RequestState",
        "detokenizer is_prefilling prompt_len",
        "read",
        "metrics",
    ),
    *vllm_names(
        "vllm.v1.engine.detokenizer:IncrementalDetokenizer",
        "num_output_tokens",
        "called",
        "metrics",
    ),
    *vllm_names("vllm.v1.engine:FinishReason", "ABORT ERROR", "read", "metrics"),
)
