"""The engine process of the parity trials: ``python -m vllm_steer.doctor.engine_process``.

It reads a job, starts vLLM with the job's steers, and writes the output after each batch, so that
an engine that crashes leaves the output of the batches before.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_steer.compat import options
from vllm_steer.files.atomic_write import write_text
from vllm_steer.site_report import SiteReport, join_reports

Setting = dict[str, Any]
"""A strength by steer, or a steer's options as in a request."""


@dataclass(frozen=True)
class Job:
    """A job for the engine: in each batch every setting with every prompt, decoded greedily."""

    model: str
    options: dict[str, Any]
    steers: dict[str, str]
    prompts: list[list[int]]
    batches: dict[str, list[Setting]]
    max_tokens: int


@dataclass(frozen=True)
class Completion:
    """The generated tokens and the log-probability of each."""

    setting: Setting
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass
class EngineOutput:
    """Properties of the engine, what its self-test found, and its completions by batch."""

    dtype: str = ""
    runner: str = ""
    device: str = ""
    sites: SiteReport = field(default_factory=dict)
    batches: dict[str, list[Completion]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "EngineOutput":
        """Read what the process wrote; empty if it wrote nothing."""
        if not path.exists():
            return cls()
        data = json.loads(path.read_text(encoding="utf-8"))
        batches = {
            n: [Completion(**completion) for completion in b]
            for n, b in data.pop("batches").items()
        }
        return cls(**data, batches=batches)


def serve(job: Job, output_path: Path) -> None:
    """Start an engine for a job, run its batches in order and write the output after each."""
    from vllm import LLM

    steer = {
        "steers": {name: {"path": path} for name, path in job.steers.items()},
        "limits": {"max_steers_per_request": len(job.steers)},
    }
    # With prefix caching, equal batches would not be computed identically.
    llm = LLM(
        job.model,
        skip_tokenizer_init=True,
        language_model_only=True,  # a multimodal model takes text alone
        enable_prefix_caching=False,
        seed=0,
        additional_config={"steer": steer},
        **job.options,
    )
    config = llm.llm_engine.vllm_config
    output = EngineOutput(
        dtype=str(options.dtype(config)).removeprefix("torch."),
        runner="V2" if options.use_v2_model_runner(config) else "V1",
        device=options.device_type(config),
        sites=join_reports(llm.collective_rpc("steer_sites")),
    )
    write_text(output_path, json.dumps(asdict(output)))
    for name, settings in job.batches.items():
        output.batches[name] = _complete(llm, job, settings)
        write_text(output_path, json.dumps(asdict(output)))
    llm.llm_engine.engine_core.shutdown()


def _complete(llm: Any, job: Job, settings: Sequence[Setting]) -> list[Completion]:
    pairs = [(setting, prompt) for setting in settings for prompt in job.prompts]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in pairs],
        [_greedy(setting, job.max_tokens) for setting, _ in pairs],
        use_tqdm=False,
    )
    return [
        Completion(dict(setting), prompt, *_tokens_and_logprobs(output.outputs[0]))
        for (setting, prompt), output in zip(pairs, outputs, strict=True)
    ]


def _greedy(setting: Mapping[str, Any], max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        extra_args={"steer": dict(setting)} if setting else None,
    )


def _tokens_and_logprobs(completion: Any) -> tuple[list[int], list[float]]:
    tokens = list(completion.token_ids)
    steps = zip(tokens, completion.logprobs, strict=True)
    return tokens, [float(step[token].logprob) for token, step in steps]


if __name__ == "__main__":
    serve(Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), Path(sys.argv[2]))
