"""Requests counted by steer, on vLLM's own output processor."""

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from prometheus_client import REGISTRY
from reported import DELTA, FINAL, add, generate, params, step
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_steer import embedded
from vllm_steer.doses import Dose
from vllm_steer.plan import SteerPlan
from vllm_steer.serving import request_counting as counting
from vllm_steer.serving.metrics import labels
from vllm_steer.serving.metrics.labels import bounded_label, steer_labels

PROMPT_LENGTH = 3
"""Of every request of ``reported``."""


@pytest.fixture
def plan(make_plan: Callable[..., SteerPlan]) -> SteerPlan:
    return make_plan({"a": 1.0, "b": 1.0})


@pytest.fixture
def processor(plan: SteerPlan) -> OutputProcessor:
    processor = OutputProcessor(None, log_stats=False)
    counting.count_requests(processor, plan)
    return processor


def samples() -> dict[tuple[str, ...], float]:
    """By the metric's name without prefix and suffix, and its labels' values."""
    return {
        (name.removeprefix("vllm_steer_").removesuffix("_total"), *sample.labels.values()): value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        for name, value in [(sample.name, sample.value)]
        if name.startswith("vllm_steer_") and name.endswith("_total")
    }


class Growth:
    """What has been counted since it was made: only what is not 0."""

    def __init__(self) -> None:
        self._before = samples()

    def __call__(self) -> dict[tuple[str, ...], float]:
        grown = {key: value - self._before.get(key, 0.0) for key, value in samples().items()}
        return {key: value for key, value in grown.items() if value}


def asking(steer: Any, **fields: Any) -> Any:
    return params(FINAL, extra_args=None if steer is None else {"steer": steer}, **fields)


def finish(processor: OutputProcessor, steer: Any, num_tokens: int, **fields: Any) -> None:
    for name in add(processor, asking(steer, **fields)):
        generate(processor, name, [None] * num_tokens)


def counted(steer: str, tokens: int, *, requests: int = 1) -> dict[tuple[str, ...], float]:
    return {
        ("requests", steer, "finished"): requests,
        ("prompt_tokens", steer): requests * PROMPT_LENGTH,
        ("generation_tokens", steer): tokens,
    }


def test_a_request_counts_under_its_steer_when_it_ends(processor: OutputProcessor) -> None:
    growth = Growth()
    (name,) = add(processor, asking("a:2"))
    step(processor, {name: (10, None)})
    assert growth() == {}
    step(processor, {name: (11, None)}, last=[name])
    assert growth() == {**counted("a", 2), ("steered_requests", "finished"): 1}


def test_a_request_with_two_steers_counts_under_both_and_once_as_steered(
    processor: OutputProcessor,
) -> None:
    growth = Growth()
    finish(processor, {"a": 1, "b": {"strength": -1}}, 4)
    both = counted("a", 4) | counted("b", 4)
    assert growth() == {**both, ("steered_requests", "finished"): 1}


@pytest.mark.parametrize("steer", [None, "none", "", {}, "a:0"], ids=repr)
def test_a_request_without_an_acting_steer_counts_under_none(
    processor: OutputProcessor, steer: Any
) -> None:
    growth = Growth()
    finish(processor, steer, 2)
    assert growth() == counted("none", 2)


def test_a_steer_that_a_request_names_twice_counts_once(processor: OutputProcessor) -> None:
    growth = Growth()
    finish(processor, "a:1,a:0.5", 1)
    assert growth() == {**counted("a", 1), ("steered_requests", "finished"): 1}


def test_the_configs_default_counts_where_a_request_does_not_ask(
    make_plan: Callable[..., SteerPlan],
) -> None:
    processor = OutputProcessor(None, log_stats=False)
    plan = make_plan({"a": 1.0, "b": 1.0}, default="b:3")
    counting.count_requests(processor, plan)
    growth = Growth()
    finish(processor, None, 2)
    finish(processor, "none", 1)
    steered = {("steered_requests", "finished"): 1}
    assert growth() == counted("b", 2) | counted("none", 1) | steered


def test_each_of_several_sequences_counts_as_a_request(processor: OutputProcessor) -> None:
    growth = Growth()
    finish(processor, "a", 3, n=2)
    assert growth() == {**counted("a", 6, requests=2), ("steered_requests", "finished"): 2}


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (FinishReason.STOP, "finished"),
        (FinishReason.LENGTH, "finished"),
        (FinishReason.REPETITION, "finished"),
        (FinishReason.ABORT, "aborted"),
        (FinishReason.ERROR, "failed"),
    ],
    ids=lambda value: str(value),
)
def test_the_status_follows_from_the_finish_reason(
    processor: OutputProcessor, reason: FinishReason, status: str
) -> None:
    growth = Growth()
    (name,) = add(processor, asking("a"))
    generate(processor, name, [None], reason=reason)
    assert growth()[("requests", "a", status)] == 1
    assert growth()[("steered_requests", status)] == 1


def test_a_stop_string_leaves_the_tokens_that_the_client_gets(plan: SteerPlan) -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(embedded.MODEL)
    processor = OutputProcessor(tokenizer, log_stats=False)
    counting.count_requests(processor, plan)
    tokens = tokenizer.encode("the little dog and the cat", add_special_tokens=False)
    growth = Growth()
    (name,) = add(processor, asking("a", stop=["dog"]))
    outputs: list[Any] = []
    for token in tokens:
        outputs += step(processor, {name: (token, None)}).request_outputs
    (output,) = outputs
    assert output.outputs[0].stop_reason == "dog"
    expected = counted("a", len(output.outputs[0].token_ids))
    assert growth() == {**expected, ("steered_requests", "finished"): 1}


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("internal", [True, False], ids=["internal-id", "users-id"])
def test_an_aborted_request_counts_what_it_computed(
    processor: OutputProcessor, internal: bool, num_tokens: int
) -> None:
    growth = Growth()
    (name,) = add(processor, asking("a"))
    for token in range(num_tokens):
        step(processor, {name: (10 + token, None)})
    processor.abort_requests((one for one in [name if internal else "r"]), internal=internal)
    step(processor, {name: (9, None)}, last=[name])  # in flight at the abort
    expected = {("requests", "a", "aborted"): 1, ("steered_requests", "aborted"): 1}
    if num_tokens:
        expected |= {("prompt_tokens", "a"): PROMPT_LENGTH, ("generation_tokens", "a"): num_tokens}
    assert growth() == expected


@pytest.mark.parametrize("internal", [True, False], ids=["the-parent", "users-id"])
def test_aborting_a_parent_counts_each_running_sequence_once(
    processor: OutputProcessor, internal: bool
) -> None:
    async def run() -> None:
        queue = RequestOutputCollector(DELTA, "r-internal")
        first, second = add(processor, params(DELTA, n=2, extra_args={"steer": "b"}), queue=queue)
        step(processor, {first: (10, None), second: (20, None)}, last=[first])
        processor.abort_requests(["r-internal" if internal else "r"], internal=internal)

    growth = Growth()
    asyncio.run(run())
    assert growth() == {
        ("requests", "b", "finished"): 1,
        ("requests", "b", "aborted"): 1,
        ("steered_requests", "finished"): 1,
        ("steered_requests", "aborted"): 1,
        ("prompt_tokens", "b"): 2 * PROMPT_LENGTH,
        ("generation_tokens", "b"): 2,
    }
    assert not processor.request_states


def test_a_steer_that_is_gone_does_not_stop_a_request(
    processor: OutputProcessor, plan: SteerPlan
) -> None:
    growth = Growth()
    finish(processor, "unloaded:1", 1)
    assert growth() == {**counted("_other", 1), ("steered_requests", "finished"): 1}


def test_the_series_of_the_configs_steers_begin_at_0(make_plan: Callable[..., SteerPlan]) -> None:
    plan = make_plan({"new-one": 1.0})
    assert not any("new-one" in key for key in samples())
    counting.count_requests(OutputProcessor(None, log_stats=False), plan)
    for status in ("finished", "aborted", "failed"):
        assert samples()[("requests", "new-one", status)] == 0
    assert samples()[("generation_tokens", "new-one")] == 0


def test_an_engine_without_a_plan_is_not_wrapped() -> None:
    processor = OutputProcessor(None, log_stats=False)
    engine = SimpleNamespace()

    def start(self: Any) -> None:
        self.vllm_config = SimpleNamespace(additional_config={})
        self.output_processor = processor

    counting.with_counted_requests(start, engine)
    wrapped = ("add_request", "abort_requests", "_update_stats_from_finished")
    assert not set(wrapped) & set(vars(processor))


def test_an_engine_with_a_plan_counts_its_own_requests_only(plan: SteerPlan) -> None:
    engines = []
    for additional in ({"steer": plan.to_json()}, {}):
        engine = SimpleNamespace()

        def start(self: Any, additional: Any = additional) -> None:
            self.vllm_config = SimpleNamespace(additional_config=additional)
            self.output_processor = OutputProcessor(None, log_stats=False)

        counting.with_counted_requests(start, engine)
        engines.append(engine)
    growth = Growth()
    for engine in engines:
        finish(engine.output_processor, "a", 1)
    assert growth() == {**counted("a", 1), ("steered_requests", "finished"): 1}


def test_a_vllm_without_the_names_is_served_without_these_metrics(
    plan: SteerPlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counting, "unavailable_reason", lambda _: "vLLM 9.0 has no X.y")
    processor = OutputProcessor(None, log_stats=False)
    monkeypatch.setattr(counting.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        counting.count_requests(processor, plan)
    assert "requests are not counted by steer: vLLM 9.0 has no X.y" in caplog.text
    growth = Growth()
    finish(processor, "a", 1)
    assert growth() == {}


def test_steers_of_a_requests_own_files_share_one_label() -> None:
    doses = [Dose("mine", 1.0), Dose("known", 1.0), Dose("yours", 2.0)]
    assert steer_labels(doses, {"known"}) == ("steer_files", "known")
    assert steer_labels([], {"known"}) == ("none",)


def test_steers_that_are_not_known_count_as_those_of_a_requests_files(plan: SteerPlan) -> None:
    processor, known = OutputProcessor(None, log_stats=False), {"a"}
    counting.count_requests(processor, plan, lambda: known)
    growth = Growth()
    finish(processor, "a,b", 1)
    known.add("b")
    finish(processor, "b", 2)
    expected = counted("a", 1) | counted("steer_files", 1) | counted("b", 2)
    assert growth() == {**expected, ("steered_requests", "finished"): 2}


def test_names_beyond_the_bound_share_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_names", {})
    monkeypatch.setattr(labels, "MOST_STEERS", 2)
    names = ["one", "two", "none", "three", "steer_files", "one"]
    expected = ["one", "two", "none", "_other", "steer_files", "one"]
    assert [bounded_label(name) for name in names] == expected
