"""Generates steered and unsteered texts with a vLLM engine."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllm_steer.environment import CPU_CACHE
from vllm_steer.errors import SteerError, cause
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.sampling import Sampling
from vllm_steer.models import model_path

# Requests per call of LLM.generate: enough to fill a batch, few enough for the host memory.
_MAX_REQUESTS: Final = 2048
# Standard output has figures only.
_ENVIRONMENT: Final = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_SHARE_BESIDE_JUDGES: Final = 0.6


@dataclass(frozen=True)
class EngineOptions:
    """Engine arguments of vLLM; None selects vLLM's default.

    On a CPU the KV cache has the size that VLLM_CPU_KVCACHE_SPACE gives, or 2 GiB; with
    ``gpu_memory_utilization`` and without that variable the engine takes this share of the memory.
    With ``beside_judges`` an engine on a GPU takes 0.6 of its memory, if no other share is given,
    because the judges' models take the rest.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    beside_judges: bool = False

    @property
    def output_affecting(self) -> dict[str, Any]:
        """The arguments that affect generated texts: part of a run's settings."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "tensor_parallel_size": self.tensor_parallel_size,
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``LLM``."""
        arguments = {
            **vars(self),
            "distributed_executor_backend": "uni" if self.tensor_parallel_size == 1 else None,
        }
        del arguments["beside_judges"]
        return {name: value for name, value in arguments.items() if value is not None}


@dataclass(frozen=True)
class Engine:
    """A running vLLM engine with named steers."""

    llm: Any

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        steer: Mapping[str, Any] | None = None,
        *,
        on_text: Callable[[int], None] | None = None,
    ) -> list[Answers]:
        """Generate ``sampling.samples`` continuations of each prompt.

        ``steer`` is the steer value of a request, None for unsteered. With a dynamic strength the
        answers include the strengths of each text. ``on_text`` receives the number of texts
        generated so far. Raises ``SteerError`` for a prompt that exceeds the model's maximum length
        with ``max_tokens``.
        """
        tokens = [self._tokens(prompt, sampling) for prompt in prompts]
        sequences = [(p, k) for p in range(len(prompts)) for k in range(sampling.samples)]
        completions: list[Any] = []
        for start in range(0, len(sequences), _MAX_REQUESTS):
            chunk = sequences[start : start + _MAX_REQUESTS]
            outputs = self.llm.generate(
                [{"prompt_token_ids": tokens[p]} for p, _ in chunk],
                [_parameters(sampling, k, steer) for _, k in chunk],
                use_tqdm=False,
            )
            completions += [output.outputs[0] for output in outputs]
            if on_text is not None:
                on_text(len(completions))
        dynamic = _is_dynamic(steer)
        return [
            _answers(
                prompt, completions[p * sampling.samples : (p + 1) * sampling.samples], dynamic
            )
            for p, prompt in enumerate(prompts)
        ]

    def _tokens(self, prompt: str, sampling: Sampling) -> list[int]:
        tokens: list[int] = self.llm.get_tokenizer().encode(prompt)
        max_prompt_tokens = self.llm.llm_engine.model_config.max_model_len - sampling.max_tokens
        if not 1 <= len(tokens) <= max_prompt_tokens:
            raise SteerError(
                f"prompt {prompt[:60]!r} has {len(tokens)} tokens; expected 1 to "
                f"{max_prompt_tokens}, which leaves {sampling.max_tokens} for the generated text; "
                "shorten it, or raise max-model-len"
            )
        return tokens


@contextmanager
def engine(model: str, steers: Mapping[str, Path], options: EngineOptions) -> Iterator[Engine]:
    """Run vLLM with a model and the steers of the given files; the exit frees the engine's memory.

    Raises ``SteerError`` if vLLM cannot start, if a steer does not fit the model, and if the plugin
    is disabled, since requests would then run unsteered.
    """
    for name, value in _ENVIRONMENT.items():  # read when vLLM is first imported
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.platforms import current_platform

    arguments = options.arguments
    cache_size: dict[str, str] = {}
    if current_platform.is_cpu():
        # A part of a prompt with a seed stops vLLM's V1 runner on a CPU, which cannot set a random
        # generator back.
        arguments["enable_chunked_prefill"] = False
        # Faster to start. On a GPU, only the exit of a separate engine process frees all memory.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if options.gpu_memory_utilization is None:
            cache_size = {n: size for n, size in CPU_CACHE.items() if n not in os.environ}
            os.environ.update(cache_size)
    elif options.beside_judges:
        arguments = {"gpu_memory_utilization": _SHARE_BESIDE_JUDGES, **arguments}
    try:
        llm = LLM(
            model_path(model),
            seed=0,
            use_tqdm_on_load=False,
            additional_config={"steer": _steer_config(steers)},
            **arguments,
        )
    except SteerError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise SteerError(f"model {model}: vLLM cannot start ({cause(error)})") from error
    try:
        _check_active(llm)
        yield Engine(llm)
    finally:
        for name in cache_size:
            os.environ.pop(name, None)
        _stop(llm)
        del llm
        gc.collect()


def _steer_config(steers: Mapping[str, Path]) -> dict[str, Any]:
    from vllm_steer.config import Limits
    from vllm_steer.files import load_steer
    from vllm_steer.steers import LMSteer, LowRankSteer

    loaded = [load_steer(path) for path in steers.values()]
    ranks = [steer.rank for steer in loaded if isinstance(steer, LMSteer | LowRankSteer)]
    limits = {"max_rank": max([1, *ranks])}
    if len(steers) > Limits().max_steers_per_request:
        limits |= {"max_steers": len(steers), "max_steers_per_request": len(steers)}
    return {
        "steers": {name: {"path": str(path)} for name, path in steers.items()},
        "limits": limits,
    }


def _stop(llm: Any) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def _check_active(llm: Any) -> None:
    from vllm_steer.serving.plan_transport import plan_of

    if plan_of(llm.llm_engine.vllm_config) is None:
        raise SteerError(
            "vLLM runs without the plugin, so no request would be steered; unset "
            "VLLM_STEER_DISABLE, and add steer to VLLM_PLUGINS if it is set"
        )


def _answers(prompt: str, outputs: Sequence[Any], dynamic: bool) -> Answers:
    texts = tuple(output.text for output in outputs)
    num_tokens = sum(len(output.token_ids) for output in outputs)
    strengths = tuple(
        {name: tuple(values) for name, values in output.steer_strengths.items()}
        for output in (outputs if dynamic else ())
    )
    return Answers(prompt, texts, strengths, num_tokens)


def _is_dynamic(steer: Mapping[str, Any] | None) -> bool:
    doses = () if steer is None else steer.values()
    return any(isinstance(d, Mapping) and d.get("strength") == "dynamic" for d in doses)


def _parameters(sampling: Sampling, sample: int, steer: Mapping[str, Any] | None) -> Any:
    from vllm import SamplingParams

    strength_args = {"steer_strengths": True} if _is_dynamic(steer) else {}
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed + sample,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.max_tokens if sampling.exact_length else 0,
        extra_args={"steer": dict(steer) if steer else "none", **strength_args},
    )
