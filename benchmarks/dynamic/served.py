"""The models of the dynamic benchmark, and batches of requests to them.

embedded  the small model that comes with the package; its French delta, its steps repeated
          until there are enough, and its sentiment steer. Its steps are mostly overhead
llama     81 M random parameters, wide enough that a step is arithmetic; random steers

All requests of a leg start together, greedy, without end of text, each with its own prompt, new in
each leg. A request with dynamic strength generates a token every second step, all others one per
step: the *time of a token* is half the time that the first request takes for two tokens, as the
median over its tokens except the first and last ones.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.dummy_model import llama, random_lm_steer, steer_config, write_checkpoint
from benchmarks.engines import greedy
from vllm_steer import DeltaSteer, LMSteer, load_steer, save_steer

NAMES = ("embedded", "llama")
HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 768, 2048, 8, 12, 32000  # the shape of llama
LOGITS_STD = 4.0  # llama's next-token distributions have about 4 nats; with 1.0, 9.9 of ln V = 10.4
PROMPT_TOKENS = 32
LEAD_TOKENS = 4
TAIL_TOKENS = 1


@dataclass(frozen=True)
class DynamicModel:
    """A model folder and the config of its steers ``delta`` and ``lm``."""

    folder: Path
    config: dict[str, Any]
    vocab_size: int


@dataclass(frozen=True)
class DynamicLeg:
    """One batch: the time of a token, and the tokens of each request."""

    token_ms: float
    tokens: tuple[tuple[int, ...], ...]


def write_dynamic_model(name: str, folder: Path, *, steps: int) -> DynamicModel:
    """Write the model and its steers, with a delta of ``steps`` steps."""
    from transformers import AutoConfig

    folder.mkdir(parents=True)
    model, delta, lm = _embedded(steps) if name == "embedded" else _random(folder, steps)
    paths = {"delta": folder / "delta.safetensors", "lm": folder / "lm.safetensors"}
    save_steer(delta, paths["delta"])
    save_steer(lm, paths["lm"])
    vocab_size = AutoConfig.from_pretrained(model).vocab_size
    return DynamicModel(model, steer_config(paths, max(lm.rank, 1)), vocab_size)


def _embedded(steps: int) -> tuple[Path, DeltaSteer, LMSteer]:
    from vllm_steer.embedded import MODEL, STEERS

    delta = load_steer(STEERS / "french-delta.safetensors")
    lm = load_steer(STEERS / "sentiment.safetensors")
    assert isinstance(delta, DeltaSteer) and isinstance(lm, LMSteer)
    rows = torch.arange(steps) % delta.steps
    return MODEL, DeltaSteer(delta=delta.delta[rows], layers=delta.layers, site=delta.site), lm


def _random(folder: Path, steps: int) -> tuple[Path, DeltaSteer, LMSteer]:
    sizes = (HIDDEN, INNER, LAYERS, HEADS, VOCABULARY)
    shape = llama(*sizes, initializer_range=HIDDEN**-0.5, bos_token_id=0, eos_token_id=1)
    model = write_checkpoint(shape, folder / "model", torch.float32, norm=LOGITS_STD)
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(steps, LAYERS, HIDDEN, generator=generator) * 0.2
    lm = random_lm_steer(HIDDEN, HIDDEN, 0.2, generator)
    return model, DeltaSteer(delta=delta, layers=tuple(range(LAYERS)), site="heads"), lm


def draw_prompts(leg: int, count: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens, different in each leg."""
    generator = torch.Generator().manual_seed(leg)
    return torch.randint(3, vocab_size, (count, PROMPT_TOKENS), generator=generator).tolist()


def run_leg(
    llm: Any, prompts: Sequence[list[int]], steers: Sequence[Any], tokens: int
) -> DynamicLeg:
    """Serve one batch: a request per prompt, with its entry of ``steers`` (None: no steer)."""
    from vllm.sampling_params import RequestOutputKind

    engine, arrivals = llm.llm_engine, []
    tokens_by_request: list[list[int]] = [[] for _ in steers]
    for row, (prompt, steer) in enumerate(zip(prompts, steers, strict=True)):
        params = greedy(tokens, steer, output_kind=RequestOutputKind.DELTA)
        engine.add_request(str(row), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = perf_counter()
        for output in outputs:
            tokens_by_request[int(output.request_id)] += output.outputs[0].token_ids
            if output.request_id == "0" and output.outputs[0].token_ids:
                arrivals.append(now)
    assert all(len(row) == tokens for row in tokens_by_request), "a request ended early"
    return DynamicLeg(token_time_ms(arrivals), tuple(map(tuple, tokens_by_request)))


def token_time_ms(arrivals: Sequence[float]) -> float:
    """The time of a token, from the arrival times of a request's tokens."""
    timed = arrivals[LEAD_TOKENS : len(arrivals) - TAIL_TOKENS]
    pairs = zip(timed, timed[2:], strict=False)
    return statistics.median((later - earlier) / 2 for earlier, later in pairs) * 1e3
