"""Prefix caching with guidance: only equal KV is shared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import Setting, doses_of, engine, greedy, guidance_steers, prompts, steer_config
from reference import assert_guided, load_reference
from tiny_models import GUIDED_LAYERS, HIDDEN, save_tiny_model

from vllm_steer import LMSteer, Steer

pytestmark = pytest.mark.engine

PROMPT = prompts(1, length=100)
BLOCK = 32
CACHED = 96  # the full blocks of the prompt
LATE = {"phase": "generation"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"), num_layers=GUIDED_LAYERS)


@pytest.fixture(scope="module")
def steers(random_lm_steer: LMSteer) -> dict[str, Steer]:
    return {"plain": random_lm_steer, **guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)}


@pytest.fixture(scope="module")
def random_lm_steer() -> LMSteer:
    from engines import random_steers

    return random_steers(HIDDEN, 500)["plain"]


def one_by_one(llm: Any, settings: Sequence[Setting], **options: Any) -> list[Any]:
    """Outputs of requests with the same prompt, each finished before the next begins."""
    return [
        llm.generate(PROMPT, params, use_tqdm=False)[0] for params in greedy(settings, **options)
    ]


def cached(outputs: Sequence[Any]) -> list[int]:
    return [output.num_cached_tokens for output in outputs]


ALTERNATING: tuple[Setting, ...] = (
    {},
    {"push": 1.5},
    {},
    {"push": -2.0},
    {"plain": 3.0},
    {"push": 1.5},
    {"turn": 4.0},
    {"push": 1.5, "plain": 2.0},
    {"push": {"strength": 1.5, "layers": "0-1"}},
    {},
    {"push": {"strength": 1.5, "phase": "prompt"}},
    {"turn": 4.0, "push": 1.5},
    {"push": 1.5, "turn": 4.0},
    {"push": {"strength": 1.5, "layers": [0, 1]}},
    {"turn": 4.0},
    {"plain": -1.0},
)


@pytest.mark.matrix
def test_16_alternating_requests_share_only_equal_blocks(
    model: Path, steers: dict[str, Steer], tmp_path: Path
) -> None:
    reference = load_reference(model)
    with engine(model, steer_config(steers, tmp_path), block_size=BLOCK) as llm:
        outputs = one_by_one(llm, ALTERNATING)
    hits = [0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1]
    assert cached(outputs) == [CACHED * hit for hit in hits]
    for output, setting in zip(outputs, ALTERNATING, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)


def test_the_same_requests_fail_without_the_cache_key(
    model: Path, steers: dict[str, Steer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: without the plugin's key, guided requests reuse unguided KV."""
    monkeypatch.setattr(
        "vllm_steer.serving.admission.steered_salt", lambda request, *_: request.cache_salt
    )
    reference = load_reference(model)
    with engine(model, steer_config(steers, tmp_path), block_size=BLOCK) as llm:
        outputs = one_by_one(llm, ALTERNATING)
    assert cached(outputs) == [0] + [CACHED] * 15
    num_wrong = 0
    for output, setting in zip(outputs, ALTERNATING, strict=True):
        try:
            assert_guided(output, reference, doses_of(setting, steers), steers)
        except AssertionError:
            num_wrong += 1
    assert num_wrong >= 8


def test_guidance_that_begins_after_the_prompt_leaves_its_blocks_shared(
    model: Path, steers: dict[str, Steer], tmp_path: Path
) -> None:
    settings: tuple[Setting, ...] = (
        {},
        {"push": {"strength": 1.5, **LATE}},
        {"steps": 2.0},
        {"walk": {"strength": 2.0, "schedule": "start"}},
        {"turn": {"strength": 4.0, **LATE}, "steps": 1.0},
        {},
    )
    reference = load_reference(model)
    with engine(model, steer_config(steers, tmp_path), block_size=BLOCK) as llm:
        outputs = one_by_one(llm, settings, max_tokens=40)
    assert cached(outputs) == [0] + [CACHED] * 5
    for output, setting in zip(outputs, settings, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)


def test_only_requests_with_equal_doses_reuse_generated_blocks(
    model: Path, steers: dict[str, Steer], tmp_path: Path
) -> None:
    """A longer prompt that repeats a generated text finds unguided KV or none, and is correct."""
    settings: tuple[Setting, ...] = ({"steps": 2.0}, {"push": {"strength": 1.5, **LATE}}, {})
    reference = load_reference(model)
    with engine(model, steer_config(steers, tmp_path), block_size=BLOCK) as llm:
        for setting in settings:
            (first,) = one_by_one(llm, [setting], max_tokens=64)
            longer = list(first.prompt_token_ids) + list(first.outputs[0].token_ids)
            for request_value in ({}, setting):
                params = greedy([request_value])[0]
                (output,) = llm.generate({"prompt_token_ids": longer}, params, use_tqdm=False)
                assert_guided(output, reference, doses_of(request_value, steers), steers)
                if setting and not request_value:
                    assert output.num_cached_tokens <= CACHED


def test_an_unsteered_request_after_guided_ones_keeps_every_bit(
    model: Path, steers: dict[str, Steer], tmp_path: Path
) -> None:
    def exact(output: Any) -> Any:
        return [
            (token, step[token].logprob.hex())
            for token, step in zip(
                output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
            )
        ]

    config = steer_config(steers, tmp_path)
    with engine(model, config, block_size=BLOCK) as llm:
        clean = exact(one_by_one(llm, [{}])[0])
        llm.reset_prefix_cache()
        one_by_one(llm, [{"push": 2.0}, {"steps": 3.0}, {"push": {"strength": 2.0, **LATE}}])
        llm.reset_prefix_cache()
        assert exact(one_by_one(llm, [{}])[0]) == clean


@pytest.mark.matrix
def test_the_users_own_salt_is_kept(model: Path, steers: dict[str, Steer], tmp_path: Path) -> None:
    requests: list[tuple[str | None, Setting]] = [
        ("mine", {"push": 1.5}),
        ("mine", {"push": 1.5}),
        ("yours", {"push": 1.5}),
        (None, {"push": 1.5}),
        ("mine", {}),
        ("mine", {"steps": 2.0}),
        (None, {"steps": 2.0}),
    ]
    with engine(model, steer_config(steers, tmp_path), block_size=BLOCK) as llm:
        outputs = []
        for salt, setting in requests:
            prompt = {**PROMPT[0], **({"cache_salt": salt} if salt else {})}
            outputs += llm.generate(prompt, greedy([setting])[0], use_tqdm=False)
    assert cached(outputs) == [0, CACHED, 0, 0, 0, CACHED, 0]
