"""One batch of requests to a running engine, and results that are kept in a folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Doses = Mapping[str, Any]
MAX_MODEL_LEN: Final = 512


@dataclass(frozen=True)
class Request:
    """A prompt under some doses (none: unsteered); greedy without a ``seed``, sampled with one."""

    prompt: str
    doses: Doses
    seed: int | None = None


@dataclass(frozen=True)
class Served:
    """The answer to a request."""

    text: str
    tokens: tuple[int, ...]


def serve(
    model: str, steers: Mapping[str, Path], requests: Sequence[Request], max_tokens: int
) -> list[Served]:
    """The answers to all requests, in one call of one engine, which then stops.

    Sampled answers are of temperature 0.7 and top-k 50.
    """
    from vllm import SamplingParams

    from vllm_steer.evaluation.generation import EngineOptions, engine

    options = EngineOptions(max_model_len=MAX_MODEL_LEN, enforce_eager=True)
    parameters = [
        SamplingParams(
            temperature=0.0 if request.seed is None else 0.7,
            top_k=0 if request.seed is None else 50,
            seed=request.seed,
            max_tokens=max_tokens,
            extra_args={"steer": dict(request.doses) or "none"},
        )
        for request in requests
    ]
    with engine(model, steers, options) as running:
        prompts = [request.prompt for request in requests]
        outputs = running.llm.generate(prompts, parameters, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [Served(answer.text, tuple(answer.token_ids)) for answer in answers]


def kept(path: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What ``make`` returns, as JSON reads it, from the file if it is there.

    Ends the program if the file was made under other settings.
    """
    as_json = json.loads(json.dumps(settings))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != as_json:
            raise SystemExit(f"{path} was made under other settings; remove it, or give --folder")
        return found["made"]
    from vllm_steer.files.atomic_write import write_text

    text = json.dumps({"settings": as_json, "made": make()}, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return json.loads(text)["made"]
