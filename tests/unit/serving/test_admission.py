"""A request in the engine: admitted or refused, and its cache key."""

from types import SimpleNamespace
from typing import Any

import pytest
from engine_tools import engine_config


@pytest.fixture
def engine(make_plan: Any) -> Any:
    return engine_config(make_plan({"a": 1.0}, default="a:2", max_strength=5))


@pytest.mark.parametrize(
    "params",
    [
        None,
        SimpleNamespace(extra_args=None),
        SimpleNamespace(extra_args={}),
        SimpleNamespace(extra_args={"other": 1}),
        SimpleNamespace(extra_args={"steer": "a:1"}),
        SimpleNamespace(extra_args={"steer": "none"}),
        SimpleNamespace(),
    ],
    ids=repr,
)
def test_a_request_that_can_be_served_is_admitted_unchanged(engine: Any, params: Any) -> None:
    from vllm_steer.serving.admission import admit

    before = repr(params)
    admit(params, engine)
    assert repr(params) == before


def test_a_request_that_cannot_be_served_raises_vllms_validation_error_and_ours(
    engine: Any,
) -> None:
    from vllm.exceptions import VLLMValidationError

    from vllm_steer import SteerRequestError
    from vllm_steer.serving.admission import admit

    with pytest.raises(VLLMValidationError, match="strength 6; allowed: -5 to 5") as caught:
        admit(SimpleNamespace(extra_args={"steer": "a:6"}), engine)
    assert isinstance(caught.value, SteerRequestError)
    assert caught.value.parameter == "vllm_xargs.steer"


@pytest.mark.parametrize("steer", ["a:1", {"a": 1}, 5, "friendly"], ids=repr)
@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}], ids=repr)
def test_an_engine_without_a_steer_config_refuses_a_steer(
    steer: Any, additional_config: Any
) -> None:
    """Where another engine of the process has one; else nothing of vLLM is wrapped."""
    from vllm_steer.serving.admission import admit
    from vllm_steer.serving.preprocessing import preprocess_request
    from vllm_steer.serving.request_args import RejectedSteer

    core = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional_config))
    asking = SimpleNamespace(extra_args={"steer": steer})
    request = SimpleNamespace(sampling_params=asking)
    for call in (
        lambda: admit(asking, core.vllm_config),
        lambda: preprocess_request(lambda core, request: "added", core, request),
    ):
        with pytest.raises(RejectedSteer, match="started without a steer config"):
            call()


@pytest.mark.parametrize("steer", [None, "none", "", {}], ids=repr)
def test_an_engine_without_a_steer_config_serves_other_requests(steer: Any) -> None:
    from vllm_steer.serving.preprocessing import preprocess_request

    core = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    for params in (
        None,
        SimpleNamespace(extra_args=None),
        SimpleNamespace(extra_args={"steer": steer}),
    ):
        request = SimpleNamespace(sampling_params=params)
        assert preprocess_request(lambda core, request: "added", core, request) == "added"


def test_a_rejection_can_be_pickled_between_processes() -> None:
    import pickle

    from vllm_steer.serving.request_args import RejectedSteer

    error = pickle.loads(pickle.dumps(RejectedSteer("a is unknown")))
    assert (type(error), str(error)) == (RejectedSteer, str(RejectedSteer("a is unknown")))
    assert error.parameter == "vllm_xargs.steer"


@pytest.mark.parametrize(
    ("extra_args", "parameter"),
    [
        ({"steer": "unknown"}, "vllm_xargs.steer"),
        ({"steer_strengths": "perhaps"}, "vllm_xargs.steer_strengths"),
        ({"vllm_steer_stream": {}}, "vllm_xargs.vllm_steer_stream"),
    ],
    ids=str,
)
def test_a_rejection_names_the_argument_at_fault(
    engine: Any, extra_args: dict[str, Any], parameter: str
) -> None:
    from vllm_steer.serving.admission import admit
    from vllm_steer.serving.request_args import RejectedSteer

    with pytest.raises(RejectedSteer) as caught:
        admit(SimpleNamespace(extra_args=extra_args), engine)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("steer", [None, "a:1", "none"], ids=repr)
@pytest.mark.parametrize("salt", [None, "mine"], ids=repr)
def test_a_steer_at_the_head_does_not_change_the_cache_key(
    engine: Any, steer: Any, salt: str | None
) -> None:
    from vllm_steer.serving.admission import admit_and_set_cache_key

    params = SimpleNamespace(extra_args={"steer": steer} if steer else None)
    request = SimpleNamespace(
        sampling_params=params, cache_salt=salt, prompt_token_ids=[1, 2], prompt_embeds=None
    )
    admit_and_set_cache_key(request, engine)
    assert request.cache_salt == salt


def test_the_engine_core_refuses_requests_that_bypass_the_frontend(engine: Any) -> None:
    from vllm_steer.serving.admission import admit_and_set_cache_key
    from vllm_steer.serving.request_args import RejectedSteer

    params = SimpleNamespace(extra_args={"steer": "b:1"})
    with pytest.raises(RejectedSteer, match="'b' is unknown; steers: a"):
        admit_and_set_cache_key(SimpleNamespace(sampling_params=params, cache_salt=None), engine)


def test_a_pooling_request_has_no_cache_key_of_ours(engine: Any) -> None:
    from vllm_steer.serving.admission import admit_and_set_cache_key

    request = SimpleNamespace(sampling_params=None, cache_salt=None, prompt_token_ids=[1])
    admit_and_set_cache_key(request, engine)
    assert request.cache_salt is None
