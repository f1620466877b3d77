"""Dynamic strengths in a running engine: Hugging Face's, stream by stream and without a cache."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from dynamic_outputs import assert_dynamic
from dynamic_reference import reference_generate
from engines import (
    RUNNER,
    Setting,
    doses_of,
    dynamic,
    engine,
    greedy,
    is_dynamic,
    reporting,
    samples,
)
from reference import assert_guided, load_reference
from scheduling import leftovers, scheduler_of

from vllm_steer import embedded, load_steer
from vllm_steer.embedded import corpus

pytestmark = pytest.mark.engine

# On a CPU the V2 runner's own kernels are interpreted: a step takes a third of a second.
TOKENS = 24 if RUNNER == "v1" else 8
slow_on_v2 = pytest.mark.matrix if RUNNER == "v2" else pytest.mark.engine

FRENCH, GERMAN = {"french-delta": dynamic(top_p=0.6)}, {"german-delta": dynamic(1.5, top_p=0.8)}
FORMAL = {"formality-vector": dynamic(3.0, top_p=0.9)}
GLAD = {"sentiment": dynamic(5.0, top_p=0.7)}

# Ordinary, fixed and dynamic: deltas, vectors that are added and that rotate, LM-Steers; one to
# three properties, both forms of the divergence, both signs, beside fixed doses.
MIXED: tuple[Setting, ...] = (
    {},
    FRENCH,
    {"sentiment": 4.0},
    {**FRENCH, **GERMAN},
    GERMAN,
    {"french-delta": {"strength": 1.5, "schedule": "dim"}, "formality-vector": 2.0},
    GLAD,
    {**GERMAN, **FORMAL, **GLAD},
    {"formality-shift": dynamic(-2.0, top_p=0.9)},
    {},
    {"french-vector": dynamic(5.0, kl="authors")},
    {"sentiment": dynamic(-4.0, top_p=0.9), "formality": dynamic(4.0, top_p=0.9)},
    {"french-delta": dynamic(2.0, layers="1-2"), "german-vector": 2.0, "formality": -3.0},
    {"german-vector": 3.0},
    {"sentiment-vector": dynamic(2.0, top_p=0.8), "spanish": dynamic(5.0, top_p=0.8)},
    {"french": dynamic(4.0), "formality-vector": {"strength": 2.0, "phase": "generation"}},
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(embedded.MODEL)


@pytest.fixture(scope="module")
def steers() -> dict[str, Any]:
    return {path.stem: load_steer(path) for path in embedded.STEERS.glob("*.safetensors")}


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference(embedded.MODEL)


@pytest.fixture(scope="module")
def llm(reference: Any) -> Iterator[Any]:
    config = str(embedded.STEER_CONFIG)
    with engine(embedded.MODEL, config, skip_tokenizer_init=False, max_num_seqs=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[dict[str, list[int]]]:
    """A prompt for each of 16 requests."""
    texts = (*corpus.OPEN_PROMPTS, *corpus.NEUTRAL_PROMPTS)
    return [{"prompt_token_ids": ids} for ids in tokenizer(list(texts[:16])).input_ids]


def generate(llm: Any, prompts: Sequence[Any], settings: Sequence[Setting], **options: Any) -> Any:
    return llm.generate(list(prompts), reporting(greedy(settings, **options)), use_tqdm=False)


def check(outputs: Any, reference: Any, settings: Sequence[Setting], steers: Any) -> None:
    for output, setting in zip(outputs, settings, strict=True):
        doses = doses_of(setting, steers)
        if is_dynamic(setting):
            assert_dynamic(output, reference, doses, steers)
        else:
            assert_guided(output, reference, doses, steers)


@pytest.fixture(scope="module")
def together(llm: Any, prompts: Any) -> Any:
    """One batch of all."""
    return generate(llm, prompts, MIXED, max_tokens=TOKENS)


def test_each_request_of_a_mixed_batch_gets_the_reference_result(
    together: Any, reference: Any, steers: Any
) -> None:
    check(together, reference, MIXED, steers)
    all_strengths = [
        strength
        for output, setting in zip(together, MIXED, strict=True)
        if is_dynamic(setting)
        for strengths in output.outputs[0].steer_strengths.values()
        for strength in strengths
    ]
    assert (
        any(0.01 < strength < 1.9 for strength in all_strengths)
        and 2.0 in all_strengths
        and min(all_strengths) < -0.01
    )


@slow_on_v2
@pytest.mark.parametrize("setting", [FRENCH, {**FRENCH, **GERMAN}, MIXED[7]], ids=[1, 2, 3])
def test_a_request_is_steered_alone_as_in_a_batch(
    setting: Setting, llm: Any, prompts: Any, together: Any, reference: Any, steers: Any
) -> None:
    index = MIXED.index(setting)
    alone = generate(llm, prompts[index : index + 1], [setting], max_tokens=TOKENS)
    check(alone, reference, [setting], steers)
    assert alone[0].outputs[0].token_ids == together[index].outputs[0].token_ids


@slow_on_v2
def test_a_short_greedy_text_equals_the_reference(
    llm: Any, prompts: Any, reference: Any, steers: Any
) -> None:
    setting = MIXED[7]
    (output,) = generate(llm, prompts[:1], [setting], max_tokens=10)
    doses = doses_of(setting, steers)
    prompt = prompts[0]["prompt_token_ids"]
    assert (
        output.outputs[0].token_ids
        == reference_generate(reference, prompt, doses, steers, max_tokens=10).tokens
    )


def test_requests_without_dynamic_strength_ignore_dynamic_requests_in_the_batch(
    llm: Any, prompts: Any, together: Any
) -> None:
    indices = [index for index, setting in enumerate(MIXED) if not is_dynamic(setting)]
    without_dynamic = generate(
        llm, [prompts[i] for i in indices], [MIXED[i] for i in indices], max_tokens=TOKENS
    )
    for index, output in zip(indices, without_dynamic, strict=True):
        beside, alone = together[index].outputs[0], output.outputs[0]
        assert beside.token_ids == alone.token_ids
        for token, a, b in zip(alone.token_ids, alone.logprobs, beside.logprobs, strict=True):
            assert abs(a[token].logprob - b[token].logprob) <= 1e-5


@slow_on_v2
def test_a_prompt_of_one_token_is_steered(llm: Any, reference: Any, steers: Any) -> None:
    settings = [FRENCH, GLAD, MIXED[7], MIXED[14]]
    outputs = generate(llm, [{"prompt_token_ids": [43]}] * 4, settings)
    check(outputs, reference, settings, steers)


def test_one_generated_token_has_one_strength(
    llm: Any, prompts: Any, reference: Any, steers: Any
) -> None:
    settings = [FRENCH, GLAD, MIXED[7]]
    outputs = generate(llm, prompts[:3], settings, max_tokens=1)
    check(outputs, reference, settings, steers)
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    assert [len(v) for o in outputs for v in o.outputs[0].steer_strengths.values()] == [1] * 5


@slow_on_v2
def test_the_strength_is_zero_after_the_last_step_of_a_delta(
    llm: Any, prompts: Any, reference: Any, steers: Any
) -> None:
    settings = [GERMAN, {**FRENCH, **GLAD}, {**FRENCH, **FORMAL}]
    outputs = generate(llm, prompts[:3], settings, max_tokens=40)
    check(outputs, reference, settings, steers)
    for output, name in zip(outputs, ["german-delta", "french-delta", "french-delta"], strict=True):
        assert output.outputs[0].steer_strengths[name][30:] == [0.0] * 10


@slow_on_v2
@pytest.mark.parametrize("setting", [FRENCH, GLAD, MIXED[7]], ids=["delta", "head", "three"])
def test_a_stop_token_ends_a_request(
    setting: Setting, llm: Any, prompts: Any, reference: Any, steers: Any
) -> None:
    (free,) = generate(llm, prompts[:1], [setting])
    end = free.outputs[0].token_ids[4]
    (output,) = generate(llm, prompts[:1], [setting], stop_token_ids=[end])
    length = free.outputs[0].token_ids.index(end) + 1
    assert output.outputs[0].token_ids == free.outputs[0].token_ids[:length]
    assert output.outputs[0].finish_reason == "stop"
    assert all(len(s) == length for s in output.outputs[0].steer_strengths.values())
    assert_dynamic(output, reference, doses_of(setting, steers), steers)


@slow_on_v2
@pytest.mark.parametrize("setting", [FRENCH, GLAD, MIXED[7]], ids=["delta", "head", "three"])
def test_a_stop_string_ends_a_request(
    setting: Setting, llm: Any, prompts: Any, tokenizer: Any, reference: Any, steers: Any
) -> None:
    (free,) = generate(llm, prompts[:1], [setting])
    tokens = free.outputs[0].token_ids
    stop = tokenizer.decode(tokens[:6])[-3:]
    (output,) = generate(llm, prompts[:1], [setting], stop=[stop], detokenize=True)
    ended = output.outputs[0]
    assert ended.finish_reason == "stop" and ended.stop_reason == stop
    assert 1 <= len(ended.token_ids) <= 6 and ended.token_ids == tokens[: len(ended.token_ids)]
    assert stop not in ended.text
    assert_dynamic(output, reference, doses_of(setting, steers), steers)


def sampled(setting: Setting, **options: Any) -> list[Any]:
    """Sampling parameters at temperature 1."""
    return reporting(greedy([setting], max_tokens=16, temperature=1.0, **options))


@samples
@slow_on_v2
@pytest.mark.parametrize("setting", [FRENCH, GLAD, MIXED[7]], ids=["delta", "head", "three"])
def test_each_sample_of_a_request_has_the_strengths_of_its_own_text(
    setting: Setting, llm: Any, prompts: Any, reference: Any, steers: Any
) -> None:
    (both,) = llm.generate(prompts[:1], sampled(setting, n=2, seed=7), use_tqdm=False)
    assert both.outputs[0].token_ids != both.outputs[1].token_ids
    assert_dynamic(both, reference, doses_of(setting, steers), steers, greedy=False)
    for seed, completion in zip((7, 8), both.outputs, strict=True):
        (single,) = llm.generate(prompts[:1], sampled(setting, seed=seed), use_tqdm=False)
        assert single.outputs[0].token_ids == completion.token_ids
        for name, strengths in single.outputs[0].steer_strengths.items():
            assert strengths == pytest.approx(completion.steer_strengths[name], abs=1e-4)


@samples
@slow_on_v2
@pytest.mark.parametrize("setting", [FRENCH, GLAD], ids=["delta", "head"])
def test_penalties_and_truncation_apply_to_the_main_stream_only(
    setting: Setting, llm: Any, prompts: Any, reference: Any, steers: Any
) -> None:
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "min_p": 0.02, "seed": 3}
    (output,) = llm.generate(prompts[:1], sampled(setting, **options), use_tqdm=False)
    assert_dynamic(output, reference, doses_of(setting, steers), steers, greedy=False)


@slow_on_v2
def test_a_request_without_steer_strengths_gets_none(llm: Any, prompts: Any) -> None:
    outputs = llm.generate(prompts[:3], greedy([{}, FRENCH, GLAD]), use_tqdm=False)
    assert [getattr(o.outputs[0], "steer_strengths", None) for o in outputs] == [None] * 3


def steps_of(llm: Any, prompt: Any, params: Any) -> SimpleNamespace:
    """The number of model runs of an engine for one request, and its number of streams."""
    scheduler = scheduler_of(llm)
    counted = SimpleNamespace(steps=0, streams=0)
    schedule = scheduler.schedule

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        counted.steps += output.total_num_scheduled_tokens > 0
        counted.streams = max(counted.streams, len(output.num_scheduled_tokens))
        return output

    scheduler.schedule = counting
    try:
        llm.generate(prompt, params, use_tqdm=False)
    finally:
        scheduler.schedule = schedule
    return counted


@pytest.mark.parametrize(
    ("setting", "per_token", "streams"),
    [
        ({}, 1, 1),
        (GLAD, 1, 1),
        (MIXED[11], 1, 1),
        (FRENCH, 2, 2),
        (MIXED[7], 2, 3),
    ],
    ids=["ordinary", "head", "two-at-the-head", "delta", "two-and-one-at-the-head"],
)
def test_a_token_takes_two_steps_inside_the_layers_and_one_at_the_head(
    setting: Setting, per_token: int, streams: int, llm: Any, prompts: Any
) -> None:
    counted = steps_of(llm, prompts[:1], reporting(greedy([setting], max_tokens=10)))
    assert per_token * 10 <= counted.steps <= per_token * 10 + 1
    assert counted.streams == streams


def test_no_stream_leaves_resources(llm: Any, together: Any) -> None:
    assert leftovers(llm) == {}
