"""Admission of requests with dynamic strength, and the errors of refused ones."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_tools import connector, engine_config, speculative
from guidance import delta, head, plan_for, vector
from vllm import PoolingParams, SamplingParams
from vllm.config import ParallelConfig, SchedulerConfig, VllmConfig

from vllm_steer import SteerError, SteerRequestError
from vllm_steer.doses import Dose, is_dynamic
from vllm_steer.serving import startup_checks as startup
from vllm_steer.serving.admission import admit, admit_and_set_cache_key
from vllm_steer.serving.cache_key import SteeredSalt
from vllm_steer.serving.request_args import (
    STREAM,
    RejectedSteer,
    StreamRequest,
    doses_of,
    wants_strengths,
)

STEERS: dict[str, Any] = {
    "fr": delta(3, (0, 2)),
    "de": delta(3, (0, 2), seed=1),
    "push": vector((0, 2)),
    "word": head(),
}
PLAN = plan_for(STEERS)

INSIDE, AT_HEAD = "fr:dynamic", "word:dynamic"
MIXED = "word:dynamic,push:1"
DYNAMIC = [INSIDE, "push:dynamic", "fr:dynamic,de:dynamic:1", AT_HEAD, MIXED]


def engine(default: str = "none", **changed: Any) -> Any:
    """The config of an engine that can serve dynamic strengths, with changes.

    A change may be a function that makes it: some vLLM refuses it while it is made.
    """
    limits = {"scheduler_config__max_num_seqs": 4}
    changed = {name: value() if value is speculative else value for name, value in changed.items()}
    return engine_config(plan_for(STEERS, default=default), **limits | changed)


def params(steer: Any = None, *, extra: Any = None, **fields: Any) -> SamplingParams:
    steer_fields = {} if steer is None else {"steer": steer}
    return SamplingParams(extra_args={**steer_fields, **(extra or {})} or None, **fields)


def request(sampling_params: Any, **fields: Any) -> Any:
    arguments = {"request_id": "r", "prompt_token_ids": [1, 2, 3], "prompt_embeds": None} | fields
    return SimpleNamespace(sampling_params=sampling_params, cache_salt=None, **arguments)


@pytest.mark.parametrize("steer", DYNAMIC)
@pytest.mark.parametrize(
    "scheduler_options", [{}, {"scheduler_config__max_num_active_seqs": None}], ids=str
)
def test_an_ordinary_engine_takes_dynamic_requests(steer: str, scheduler_options: Any) -> None:
    sampling = params(steer, temperature=0.7, logprobs=3, n=2, extra={"steer_strengths": True})
    doses = plan_for(STEERS).doses(steer)
    assert is_dynamic(doses)
    assert admit(sampling, engine(**scheduler_options)) == doses
    assert admit_and_set_cache_key(request(sampling), engine(**scheduler_options)) == doses
    assert admit(params(), engine(steer, **scheduler_options)) == doses


EVERYWHERE: list[tuple[dict[str, Any], str]] = [
    (
        {"speculative_config": speculative},
        "does not work with speculative decoding: .*; restart without a draft model, or give the "
        "steers fixed strengths",
    ),
]
IN_STREAMS: list[tuple[dict[str, Any], str]] = [
    (
        {"parallel_config__pipeline_parallel_size": 2},
        "does not work with pipeline parallelism: .*; restart with pipeline_parallel_size 1, or",
    ),
    (
        {"kv_transfer_config": connector("NixlConnector")},
        "does not work with a KV connector, .*; restart without kv_transfer_config, or",
    ),
    (
        {"scheduler_config__prefill_schedule_interval": 4},
        "wait for each other's prompts; restart with prefill_schedule_interval 1, or",
    ),
    (
        {"scheduler_config__max_num_seqs": 2},
        r"need 3 streams at once and the engine runs 2 requests at once; .* "
        r"--max-num-seqs 3 or more",
    ),
    ({"scheduler_config__max_num_active_seqs": 2}, "the engine runs 2 requests at once"),
]


EVERYWHERE_IDS = ["speculation"]
IN_STREAMS_IDS = ["pipeline", "connector", "interval", "seats", "active-seats"]


def assert_refused(steer: str, changed: dict[str, Any], message: str) -> None:
    """At both doors, also as the default of a request that does not ask; fixed doses are not."""
    for call in (
        lambda: admit(params(steer), engine(**changed)),
        lambda: admit_and_set_cache_key(request(params(steer)), engine(**changed)),
        lambda: admit(params(), engine(steer, **changed)),
        lambda: admit_and_set_cache_key(request(params()), engine(steer, **changed)),
    ):
        with pytest.raises(RejectedSteer, match=message) as caught:
            call()
        assert len(str(caught.value)) < 400
    for fixed in (None, "none", "fr:1", "word:2,push:1"):
        admit(params(fixed), engine(**changed))
    admit(params("none"), engine(steer, **changed))


@pytest.mark.parametrize(("changed", "message"), EVERYWHERE, ids=EVERYWHERE_IDS)
@pytest.mark.parametrize("steer", DYNAMIC)
def test_an_engine_without_dynamic_strength_gives_a_reason(
    steer: str, changed: dict[str, Any], message: str
) -> None:
    assert_refused(steer, changed, message)


@pytest.mark.parametrize(("changed", "message"), IN_STREAMS, ids=IN_STREAMS_IDS)
def test_stream_requirements_apply_only_to_requests_with_streams(
    changed: dict[str, Any], message: str
) -> None:
    assert_refused(INSIDE, changed, message)
    admit(params(AT_HEAD), engine(**changed))


def test_each_probed_steer_needs_a_slot() -> None:
    two = engine(scheduler_config__max_num_seqs=3)
    admit(params("fr:dynamic,word:dynamic"), two)
    admit(params("word:dynamic,push:1"), engine(scheduler_config__max_num_seqs=2))
    with pytest.raises(RejectedSteer, match="need 4 streams at once and the engine runs 3"):
        admit(params("fr:dynamic,de:dynamic"), two)


def test_an_engine_with_lora_serves_dynamic_strength_inside_the_layers_only() -> None:
    lora = {"lora_config": SimpleNamespace(max_loras=1)}
    admit(params(INSIDE), engine(**lora))
    admit(params("fr:dynamic,word:1"), engine(**lora))
    for steer in (AT_HEAD, MIXED, "fr:dynamic,word:dynamic"):
        assert_refused(
            steer, lora, "LoRA for a steer at the LM head: LoRA would not be applied .*; rest"
        )


@pytest.mark.parametrize(
    ("make_params", "message"),
    [
        (lambda steer: params(steer, prompt_logprobs=2), r"leave prompt_logprobs away, or give"),
        (lambda steer: params(steer, prompt_logprobs=0), "there are no prompt logprobs under it"),
        (
            lambda steer: SimpleNamespace(extra_args=_arguments_of(steer)),
            "has SimpleNamespace; generate",
        ),
    ],
    ids=["prompt-logprobs", "prompt-logprobs-0", "others"],
)
@pytest.mark.parametrize("steer", DYNAMIC)
def test_sampling_parameters_that_do_not_go_with_dynamic_strength(
    steer: str, make_params: Callable[[str | None], Any], message: str
) -> None:
    with pytest.raises(RejectedSteer, match=r"^dynamic strength \(") as caught:
        admit(make_params(steer), engine())
    assert caught.match(message)
    with pytest.raises(RejectedSteer, match=message):
        admit(make_params(None), engine(steer))
    admit(make_params("fr:1"), engine(steer))
    admit(make_params("none"), engine(steer))


def test_a_dynamic_default_is_not_for_pooling() -> None:
    with pytest.raises(RejectedSteer, match="the request has PoolingParams; generate with"):
        admit(PoolingParams(), engine(INSIDE))
    admit(PoolingParams(), engine("fr:1"))


def _arguments_of(steer: str | None) -> dict[str, Any]:
    return {} if steer is None else {"steer": steer}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_embeds": torch.zeros(3, 5)}, "prompt embeddings; send text or token ids, or"),
        ({"mm_features": [object()]}, "images, audio or video in the prompt; send text only, or"),
    ],
    ids=["embeddings", "images"],
)
def test_a_prompt_that_streams_cannot_share(fields: dict[str, Any], message: str) -> None:
    for sampling, config in ((params(INSIDE), engine()), (params(), engine(INSIDE))):
        with pytest.raises(RejectedSteer, match=message):
            admit_and_set_cache_key(request(sampling, **fields), config)
    for fixed in ("fr:1", "none", AT_HEAD):
        admit_and_set_cache_key(request(params(fixed), **fields), engine())


@pytest.mark.parametrize("steer", DYNAMIC)
def test_a_prompt_that_grows_has_no_dynamic_strength(steer: str) -> None:
    with pytest.raises(RejectedSteer, match="streaming input, whose prompt grows; send the whole"):
        admit_and_set_cache_key(request(params(steer), resumable=True), engine())
    admit_and_set_cache_key(request(params("word:1"), resumable=True), engine(steer))


@pytest.mark.parametrize("steer", [None, "none", "fr:1", INSIDE])
def test_only_the_engine_may_mark_a_request_as_a_stream(steer: str | None) -> None:
    forged = params(steer, extra={STREAM: StreamRequest("other", INSIDE, 0).to_args()})
    for call in (
        lambda: admit(forged, engine()),
        lambda: admit_and_set_cache_key(request(forged), engine()),
        lambda: admit(params(steer, extra={STREAM: 0}), engine()),
    ):
        with pytest.raises(RejectedSteer, match=f"{STREAM} is given and is reserved .*; remove it"):
            call()
    unsteered = params("none", extra={STREAM: StreamRequest("other", INSIDE, 0).to_args()})
    admit(unsteered, SimpleNamespace(additional_config=None))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((value, True) for value in (True, 1, 1.0, "true", "True", " TRUE ", "1")),
        *((value, False) for value in (None, False, 0, 0.0, "false", "False", "0")),
    ],
    ids=repr,
)
def test_steer_strengths_is_a_boolean_in_every_encoding(value: Any, expected: bool) -> None:
    sampling = params(INSIDE, extra={"steer_strengths": value})
    assert wants_strengths(sampling) is expected
    admit(sampling, engine())
    admit(params(extra={"steer_strengths": value}), engine())


@pytest.mark.parametrize("value", ["yes", "", 2, -1, 0.5, float("nan"), [], [True], {}], ids=repr)
@pytest.mark.parametrize("steer", [None, INSIDE])
def test_a_value_that_is_not_a_boolean_does_not_request_strengths(
    value: Any, steer: str | None
) -> None:
    sampling = params(steer, extra={"steer_strengths": value})
    with pytest.raises(SteerRequestError, match=r"steer_strengths is .*; expected true or false"):
        wants_strengths(sampling)
    with pytest.raises(RejectedSteer, match=r"steer_strengths is .*; expected true or false"):
        admit(sampling, engine())


def test_an_empty_request_does_not_request_strengths() -> None:
    assert not wants_strengths(None)
    assert not wants_strengths(SamplingParams())
    assert not wants_strengths(params(INSIDE))


def test_a_stream_inherits_from_its_request() -> None:
    steer = {"push": 1, "fr": {"strength": "dynamic", "max": -1.5, "layers": "2"}}

    def of(dose: int | None, steer: Any = steer, default: str = "none") -> tuple[Dose, ...]:
        stream = StreamRequest("r", steer, dose).to_args()
        return doses_of(params(extra={STREAM: stream}), plan_for(STEERS, default=default))

    assert of(None) == ()
    assert of(1) == (Dose("fr", -1.5, (2,), "answer"),)
    assert of(0, None, "fr:dynamic:3") == (Dose("fr", 3.0, phase="answer"),)


def test_a_dynamic_request_inside_the_layers_has_a_salt_that_carries_its_keys() -> None:
    core_request = request(params("fr:dynamic,push:1"))
    admit_and_set_cache_key(core_request, engine())
    assert isinstance(core_request.cache_salt, SteeredSalt)
    assert sorted(key.position for key in core_request.cache_salt.keys) == [0, 2]
    core_request = request(params(AT_HEAD))
    admit_and_set_cache_key(core_request, engine())
    assert core_request.cache_salt is None


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """The start-up checks, of which the steers' sizes are passed."""
    monkeypatch.setattr(startup, "check_steer", lambda *args: None)
    return startup.check_engine


@pytest.mark.parametrize(
    ("changed", "message"),
    [*EVERYWHERE, *IN_STREAMS],
    ids=[*EVERYWHERE_IDS, *IN_STREAMS_IDS],
)
def test_an_engine_whose_default_cannot_be_served_does_not_start(
    start: Callable[[Any], None], changed: dict[str, Any], message: str
) -> None:
    start(engine(INSIDE))
    start(engine("fr:1", **changed))
    with pytest.raises(SteerError, match=f"^default: .*{message}") as caught:
        start(engine(INSIDE, **changed))
    assert not isinstance(caught.value, SteerRequestError)


def test_every_setting_that_is_read_exists_in_vllm() -> None:
    for owner, names in [
        (VllmConfig, ["speculative_config", "lora_config", "kv_transfer_config"]),
        (ParallelConfig, ["pipeline_parallel_size", "data_parallel_size"]),
        (SchedulerConfig, ["max_num_seqs", "prefill_schedule_interval"]),
    ]:
        assert set(names) <= {field.name for field in dataclasses.fields(owner)}


def test_a_vllm_without_dynamic_strength_support_serves_all_other_requests(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[Any], None]
) -> None:
    from vllm_steer import environment, plugin
    from vllm_steer.compat import features, patching
    from vllm_steer.serving import activation, dynamic_admission

    reason = "vLLM 9.0 has no OutputProcessor.process_outputs; install another"
    for module in (dynamic_admission, features):
        monkeypatch.setattr(module, "unavailable_reason", lambda feature: reason)
    wrapped: list[str] = []
    monkeypatch.setattr(patching, "wrap", lambda owner, name, *_, **__: wrapped.append(name))
    monkeypatch.setattr(activation, "unavailable_reason", lambda feature: reason)
    monkeypatch.delenv(environment.ACTIVE, raising=False)
    activation.activate_steering(serves_dynamic=True)
    plugin.patch_active()
    assert wrapped
    assert not {"process_outputs", "_new_completion_output"} & set(wrapped)
    for fixed in (None, "none", "fr:1", "word:2,push:1"):
        assert len(admit(params(fixed), engine())) == (fixed or "").count(":")
    for sampling in (*map(params, DYNAMIC), params("none", extra={"steer_strengths": True})):
        with pytest.raises(
            RejectedSteer, match=r"dynamic strength is not available: vLLM 9\.0 has"
        ):
            admit(sampling, engine())
    with pytest.raises(SteerError, match=r"^default: dynamic strength is not available"):
        start(engine(AT_HEAD))
