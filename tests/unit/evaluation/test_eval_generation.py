"""The requests that vLLM gets for each text, and the returned texts."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_steer import SteerError, save_steer
from vllm_steer.evaluation import generation
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.generation import Engine, EngineOptions
from vllm_steer.evaluation.sampling import Sampling, sampling_of


class FakeLLM:
    """Answers each request with the first token of its prompt, its seed and its steer."""

    def __init__(self, max_model_len: int = 100) -> None:
        config = SimpleNamespace(max_model_len=max_model_len)
        self.llm_engine = SimpleNamespace(model_config=config)
        self.sizes: list[int] = []
        self.parameters: list[Any] = []

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(encode=lambda text: [len(word) for word in text.split()])

    def generate(self, prompts: Any, parameters: Any, *, use_tqdm: bool) -> list[Any]:
        assert len(prompts) == len(parameters)
        self.sizes.append(len(prompts))
        self.parameters += parameters
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(text=f"{p['prompt_token_ids'][0]} {q.seed}", token_ids=[1, 2])
                ]
            )
            for p, q in zip(prompts, parameters, strict=True)
        ]


def test_text_k_of_every_prompt_has_seed_k() -> None:
    answers = Engine(FakeLLM()).generate(["a b", "ccc"], Sampling(samples=3, seed=7))
    assert answers == [Answers("a b", ("1 7", "1 8", "1 9")), Answers("ccc", ("3 7", "3 8", "3 9"))]
    assert [answer.num_tokens for answer in answers] == [6, 6]


def test_the_authors_settings_reach_vllm() -> None:
    llm = FakeLLM()
    parameters = {"steer": {"strength": -5.0, "layers": "1-2"}}
    Engine(llm).generate(["a"], sampling_of("lm-steer", {}), parameters)
    assert [q.seed for q in llm.parameters] == list(range(25))
    for q in llm.parameters:
        assert (q.temperature, q.top_k, q.top_p) == (1.0, 50, 0.9)
        assert q.min_tokens == q.max_tokens == 20
        assert q.extra_args == {"steer": parameters}


def test_a_run_without_a_steer_requests_none_and_texts_may_end_early() -> None:
    llm = FakeLLM()
    Engine(llm).generate(["a"], Sampling(samples=1))
    (q,) = llm.parameters
    assert q.extra_args == {"steer": "none"} and q.min_tokens == 0


def test_many_texts_are_generated_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_MAX_REQUESTS", 4)
    llm, progress = FakeLLM(), []
    prompts = ["a", "bb", "ccc"]
    answers = Engine(llm).generate(prompts, Sampling(samples=3), on_text=progress.append)
    assert (llm.sizes, progress) == ([4, 4, 1], [4, 8, 9])
    assert [a.texts for a in answers] == [tuple(f"{n} {k}" for k in range(3)) for n in range(1, 4)]


@pytest.mark.parametrize("prompt", ["a " * 81, ""])
def test_a_prompt_that_is_too_long_is_named(prompt: str) -> None:
    with pytest.raises(
        SteerError, match="tokens; expected 1 to 80, which leaves 20 for the generated"
    ):
        Engine(FakeLLM()).generate([prompt], Sampling(samples=1))


def test_vllm_without_the_plugin_is_refused() -> None:
    config = SimpleNamespace(additional_config={"steer": {"steers": {}}})
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    with pytest.raises(SteerError, match="without the plugin, so no request would be steered"):
        generation._check_active(llm)


def test_the_engine_admits_a_steer_of_any_rank(tmp_path: Path, make_steer: Any) -> None:
    save_steer(make_steer(rank=3), tmp_path / "a")
    save_steer(make_steer("add"), tmp_path / "b")
    config = generation._steer_config({"steer": tmp_path / "a", "random": tmp_path / "b"})
    assert json.loads(json.dumps(config)) == {
        "steers": {"steer": {"path": str(tmp_path / "a")}, "random": {"path": str(tmp_path / "b")}},
        "limits": {"max_rank": 3},
    }


def test_engine_options_leave_vllms_defaults() -> None:
    assert EngineOptions().arguments == {
        "dtype": "auto",
        "tensor_parallel_size": 1,
        "enforce_eager": False,
        "distributed_executor_backend": "uni",
    }
    assert EngineOptions(beside_judges=True).arguments == EngineOptions().arguments
    several = EngineOptions(max_model_len=64, tensor_parallel_size=2).arguments
    assert several["max_model_len"] == 64 and "distributed_executor_backend" not in several


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start an engine with a fake vLLM that records its arguments and its KV cache."""
    monkeypatch.setattr(generation, "_stop", lambda llm: None)
    monkeypatch.setattr(generation, "_check_active", lambda llm: None)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # restored after the test

    def start(options: EngineOptions, *, is_cpu: bool) -> tuple[str | None, float | None]:
        def fake(path: str, **arguments: Any) -> Any:
            cache = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
            return cache, arguments.get("gpu_memory_utilization")

        platform = SimpleNamespace(is_cpu=lambda: is_cpu)
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fake))
        modules = SimpleNamespace(current_platform=platform)
        monkeypatch.setitem(sys.modules, "vllm.platforms", modules)
        before = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        with generation.engine("m", {}, options) as llm_engine:
            result: tuple[str | None, float | None] = llm_engine.llm
        assert os.environ.get("VLLM_CPU_KVCACHE_SPACE") == before
        return result

    return start


def test_the_kv_cache_on_a_cpu_is_2_gib_unless_the_user_gives_a_size(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(EngineOptions(), is_cpu=True) == ("2", None)
    assert start(EngineOptions(beside_judges=True), is_cpu=True) == ("2", None)
    assert start(EngineOptions(gpu_memory_utilization=0.3), is_cpu=True) == (None, 0.3)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert start(EngineOptions(), is_cpu=True) == ("7", None)


def test_an_engine_on_a_gpu_leaves_memory_for_judges_beside_it(start: Any) -> None:
    assert start(EngineOptions(), is_cpu=False) == (None, None)
    assert start(EngineOptions(beside_judges=True), is_cpu=False) == (None, 0.6)
    shared = EngineOptions(beside_judges=True, gpu_memory_utilization=0.3)
    assert start(shared, is_cpu=False) == (None, 0.3)
