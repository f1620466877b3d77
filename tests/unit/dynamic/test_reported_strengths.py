"""Strengths on their way from engine outputs to users: on vLLM's own output processor."""

import asyncio
import gc
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import transformers
from prometheus_client import REGISTRY
from reported import (
    CUMULATIVE,
    DELTA,
    DYNAMIC,
    FINAL,
    add,
    carried,
    generate,
    params,
    step,
)
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)

from vllm_steer import embedded
from vllm_steer.compat.patching import wrap
from vllm_steer.serving.reporting_state import REPORTING, enable_reporting
from vllm_steer.serving.strength_reports import outputs

PATCHES = (
    (OutputProcessor, "add_request", outputs.with_sequence_strengths),
    (OutputProcessor, "process_outputs", outputs.with_strengths_taken),
    (RequestState, "_new_completion_output", outputs.with_strengths_on_completion),
)
FOUR = [1.5, 0.25, 0.0, 0.5]


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch, make_plan: Any) -> None:
    """The three wrappers in place, once, in a process that has admitted a dynamic request."""
    for owner, name, around in PATCHES:
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
        wrap(owner, name, around)
    monkeypatch.setattr(REPORTING, "is_enabled", False)
    monkeypatch.setattr(REPORTING, "plan", None)
    enable_reporting(make_plan({"a": 1.0, "b": 1.0}))


@pytest.fixture
def processor() -> OutputProcessor:
    return OutputProcessor(None, log_stats=False)


def completions(returned: list[Any]) -> list[Any]:
    return [completion for output in returned for completion in output.outputs]


def all_strengths(outputs: list[Any]) -> list[float]:
    return [value for completion in outputs for value in completion.steer_strengths["a"]]


def test_a_final_output_has_one_strength_per_token(processor: OutputProcessor) -> None:
    (name,) = add(processor, params(FINAL))
    (completion,) = completions(generate(processor, name, FOUR))
    assert completion.token_ids == [10, 11, 12, 13]
    assert completion.steer_strengths == {"a": FOUR}


def test_cumulative_outputs_have_the_strengths_of_all_tokens_so_far(
    processor: OutputProcessor,
) -> None:
    (name,) = add(processor, params(CUMULATIVE))
    results = completions(generate(processor, name, FOUR))
    assert [c.steer_strengths for c in results] == [{"a": FOUR[:n]} for n in (1, 2, 3, 4)]


def test_delta_outputs_have_the_strengths_of_their_own_tokens(processor: OutputProcessor) -> None:
    (name,) = add(processor, params(DELTA))
    results = completions(generate(processor, name, FOUR))
    assert [c.steer_strengths for c in results] == [{"a": [value]} for value in FOUR]


@pytest.mark.parametrize("interval", [2, 3])
def test_outputs_at_intervals_have_the_strengths_since_the_last(interval: int) -> None:
    processor = OutputProcessor(None, log_stats=False, stream_interval=interval)
    (name,) = add(processor, params(DELTA))
    strengths = [0.5 * n for n in range(7)]
    results = completions(generate(processor, name, strengths))
    assert len(results) < len(strengths)
    for completion in results:
        assert len(completion.steer_strengths["a"]) == len(completion.token_ids)
    assert all_strengths(results) == strengths


def test_outputs_merged_for_a_slow_consumer_keep_all_strengths(processor: OutputProcessor) -> None:
    async def consume() -> list[Any]:
        queue = RequestOutputCollector(DELTA, "r-internal")
        (name,) = add(processor, params(DELTA), queue=queue)
        step(processor, {name: (10, 1.5)})
        first = queue.get_nowait()
        for at in (1, 2):
            step(processor, {name: (10 + at, FOUR[at])})
        merged = await queue.get()
        step(processor, {name: (13, FOUR[3])}, last=[name])
        return [first, merged, await queue.get()]

    results = completions(asyncio.run(consume()))
    assert [list(c.token_ids) for c in results] == [[10], [11, 12], [13]]
    assert [c.steer_strengths["a"] for c in results] == [FOUR[:1], FOUR[1:3], FOUR[3:]]


def test_a_queue_of_another_class_is_unchanged(processor: OutputProcessor) -> None:
    """As vLLM 0.33 has one for streaming input."""

    class OtherQueue(RequestOutputCollector):
        pass

    async def consume() -> OtherQueue:
        queue = OtherQueue(DELTA, "r-internal")
        (name,) = add(processor, params(DELTA), queue=queue)
        step(processor, {name: (10, 1.5)}, last=[name])
        return queue

    queue = asyncio.run(consume())
    assert type(queue) is OtherQueue
    assert completions([queue.output])[0].token_ids == [10]


@pytest.mark.parametrize("kind", [FINAL, CUMULATIVE, DELTA], ids=lambda kind: kind.name.lower())
def test_each_of_several_sequences_has_its_own_strengths(
    processor: OutputProcessor, kind: RequestOutputKind
) -> None:
    async def consume() -> list[Any]:
        queue = RequestOutputCollector(kind, "r-internal")
        first, second = add(processor, params(kind, n=2), queue=queue)
        step(processor, {first: (10, 0.5), second: (20, 1.0)})
        step(processor, {first: (11, 0.25), second: (21, 0.0)}, last=[first])
        step(processor, {second: (22, 1.5)}, last=[second])
        return [await queue.get()]

    results = {c.index: c for c in completions(asyncio.run(consume()))}
    assert {index: list(c.token_ids) for index, c in results.items()} == {
        0: [10, 11],
        1: [20, 21, 22],
    }
    assert results[0].steer_strengths == {"a": [0.5, 0.25]}
    assert results[1].steer_strengths == {"a": [1.0, 0.0, 1.5]}


def test_several_sequences_without_a_queue_come_with_the_last(processor: OutputProcessor) -> None:
    first, second = add(processor, params(FINAL, n=2))
    assert generate(processor, second, [1.0, 0.5]) == []
    results = completions(generate(processor, first, [0.25]))
    assert [c.steer_strengths for c in results] == [{"a": [0.25]}, {"a": [1.0, 0.5]}]


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Any]:
    yield transformers.AutoTokenizer.from_pretrained(embedded.MODEL)


@pytest.mark.parametrize("included", [False, True], ids=["left-out", "included"])
@pytest.mark.parametrize("kind", [FINAL, DELTA], ids=["final", "delta"])
def test_a_stop_string_leaves_as_many_strengths_as_tokens(
    tokenizer: Any, kind: RequestOutputKind, included: bool
) -> None:
    processor = OutputProcessor(tokenizer, log_stats=False)
    tokens = tokenizer.encode("the little dog and the cat", add_special_tokens=False)
    sampling = params(kind, stop=["dog"], include_stop_str_in_output=included)
    (name,) = add(processor, sampling)
    results = []
    for at, token in enumerate(tokens):
        results += step(processor, {name: (token, at / 8)}).request_outputs
    strengths = all_strengths(completions(results))
    num_tokens = sum(len(c.token_ids) for c in completions(results))
    assert completions(results)[-1].stop_reason == "dog"
    assert 0 < num_tokens < len(tokens)
    assert strengths == [at / 8 for at in range(num_tokens)]


def test_tokens_behind_a_stop_string_take_their_strengths_with_them(tokenizer: Any) -> None:
    processor = OutputProcessor(tokenizer, log_stats=False)
    (stop,) = tokenizer.encode("dog", add_special_tokens=False)[-1:]
    (name,) = add(processor, params(FINAL, stop=[tokenizer.decode([stop])]))
    several = EngineCoreOutput(
        request_id=name, new_token_ids=[stop, 10, 11], kv_transfer_params=carried({"a": 0.5})
    )
    (completion,) = completions(processor.process_outputs([several]).request_outputs)
    assert list(completion.token_ids) == [stop]
    assert completion.steer_strengths == {"a": [0.5]}


def test_the_token_that_ends_a_text_has_its_strength(tokenizer: Any) -> None:
    processor = OutputProcessor(tokenizer, log_stats=False)
    (name,) = add(processor, params(FINAL))
    (completion,) = completions(generate(processor, name, FOUR, reason=FinishReason.STOP))
    assert len(completion.token_ids) == 4
    assert completion.steer_strengths == {"a": FOUR}


def test_several_steers_are_reported_separately(processor: OutputProcessor) -> None:
    request_fields = {"steer": "a:dynamic,b:dynamic:-1", "steer_strengths": 1}
    (name,) = add(processor, params(FINAL, extra_args=request_fields))
    output = EngineCoreOutput(
        request_id=name,
        new_token_ids=[10],
        finish_reason=FinishReason.LENGTH,
        kv_transfer_params=carried({"a": 0.5, "b": -1.0}),
    )
    (completion,) = completions(processor.process_outputs([output]).request_outputs)
    assert completion.steer_strengths == {"a": [0.5], "b": [-1.0]}


def test_a_request_without_steer_strengths_gets_vllms_own_output(
    processor: OutputProcessor,
) -> None:
    (name,) = add(processor, params(FINAL, extra_args={"steer": DYNAMIC}))
    (output,) = generate(processor, name, FOUR)
    assert not hasattr(output.outputs[0], "steer_strengths")
    assert output.kv_transfer_params is None


@pytest.mark.parametrize("steer", ["a:2", "none"])
def test_a_request_without_dynamic_strength_gets_empty_strengths(
    processor: OutputProcessor, monkeypatch: pytest.MonkeyPatch, steer: str
) -> None:
    monkeypatch.setattr(REPORTING, "is_enabled", False)
    request_fields = {"steer": steer, "steer_strengths": True}
    (name,) = add(processor, params(FINAL, extra_args=request_fields))
    (completion,) = completions(generate(processor, name, [None, None]))
    assert completion.steer_strengths == {}


def test_other_kv_transfer_parameters_of_an_output_are_kept(processor: OutputProcessor) -> None:
    (name,) = add(processor, params(FINAL))
    fields = {**carried({"a": 0.5}), "remote": 7}
    output = EngineCoreOutput(
        request_id=name,
        new_token_ids=[10],
        finish_reason=FinishReason.LENGTH,
        kv_transfer_params=fields,
    )
    (request_output,) = processor.process_outputs([output]).request_outputs
    assert request_output.kv_transfer_params == {"remote": 7}
    assert "vllm_steer" in fields, "the engine core's own dict was changed"


def test_an_aborted_request_leaves_no_state(processor: OutputProcessor) -> None:
    async def consume() -> tuple[Any, weakref.ref[Any], weakref.ref[Any]]:
        queue = RequestOutputCollector(DELTA, "r-internal")
        (name,) = add(processor, params(DELTA), queue=queue)
        record = weakref.ref(processor.request_states[name].steer_sequence_strengths)
        step(processor, {name: (10, 0.5)})
        processor.abort_requests([name], internal=True)
        last = await queue.get()
        step(processor, {name: (11, 0.25)})  # in flight at the abort
        return last, record, weakref.ref(queue)

    last, record, queue = asyncio.run(consume())
    assert last.outputs[0].steer_strengths == {"a": [0.5]}
    assert last.outputs[0].finish_reason == "abort"
    assert not processor.request_states
    del last
    gc.collect()
    assert record() is None
    assert queue() is None


def test_outputs_are_not_inspected_before_the_first_dynamic_request(
    processor: OutputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REPORTING, "is_enabled", False)
    monkeypatch.setattr(REPORTING, "plan", None)
    monkeypatch.setattr(outputs, "take_strengths", lambda *_: pytest.fail("looked at"))
    (name,) = add(processor, params(FINAL, extra_args=None))
    (completion,) = completions(generate(processor, name, [None]))
    assert not hasattr(completion, "steer_strengths")


def samples() -> dict[str, float]:
    """The metrics, by name and labels."""
    return {
        f"{sample.name}{sorted(sample.labels.items()) or ''}": sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith("vllm_steer_") and not sample.name.endswith("_created")
    }


@pytest.mark.parametrize("with_strengths", [True, False], ids=["asked", "not-asked"])
def test_counters_count_sequences_tokens_and_strengths(
    processor: OutputProcessor, with_strengths: bool
) -> None:
    before = samples()
    arguments = {"steer": "a:dynamic:-1.3", "steer_strengths": with_strengths}
    names = add(processor, params(FINAL, n=2, extra_args=arguments))
    for name in names:
        generate(processor, name, [-1.2999999523162842, -0.3, 0.0])  # -1.3 as float32
    grown = {name: value - before.get(name, 0.0) for name, value in samples().items()}
    of_a = "[('steer', 'a')]"
    assert grown["vllm_steer_dynamic_requests_total"] == 2
    assert grown["vllm_steer_dynamic_tokens_total"] == 6
    assert grown[f"vllm_steer_dynamic_strength_count{of_a}"] == 6
    assert grown[f"vllm_steer_dynamic_strength_sum{of_a}"] == pytest.approx(3.2)
    assert grown[f"vllm_steer_dynamic_clipped_tokens_total{of_a}"] == 2
    assert grown["vllm_steer_dynamic_strength_bucket[('le', '0.0'), ('steer', 'a')]"] == 2
    assert grown["vllm_steer_dynamic_strength_bucket[('le', '0.5'), ('steer', 'a')]"] == 4
    assert grown["vllm_steer_dynamic_strength_bucket[('le', '1.25'), ('steer', 'a')]"] == 4
    assert grown["vllm_steer_dynamic_strength_bucket[('le', '1.5'), ('steer', 'a')]"] == 6


def test_a_request_of_another_engine_with_other_steers_is_served(
    processor: OutputProcessor,
) -> None:
    request_fields = {"steer": "elsewhere:dynamic", "steer_strengths": True}
    (name,) = add(processor, params(FINAL, extra_args=request_fields))
    output = EngineCoreOutput(
        request_id=name,
        new_token_ids=[10],
        finish_reason=FinishReason.LENGTH,
        kv_transfer_params=carried({"elsewhere": 0.5}),
    )
    (completion,) = completions(processor.process_outputs([output]).request_outputs)
    assert completion.steer_strengths == {"elsewhere": [0.5]}
