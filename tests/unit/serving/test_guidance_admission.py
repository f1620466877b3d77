"""The engine core's door for requests whose steers change KV."""

from types import SimpleNamespace
from typing import Any

import pytest
from guidance import delta, head, params, plan_for, vector

from vllm_steer.serving.admission import admit_and_set_cache_key
from vllm_steer.serving.cache_key import SteeredSalt
from vllm_steer.serving.request_args import RejectedSteer

STEERS: dict[str, Any] = {"push": vector((0, 2)), "walk": delta(3, (0,)), "word": head()}


def request(steer: Any, **fields: Any) -> Any:
    arguments = {"prompt_token_ids": [1, 2, 3], "prompt_embeds": None, "cache_salt": None, **fields}
    return SimpleNamespace(sampling_params=params(steer), **arguments)


def key(core_request: Any, *, default: str = "none") -> Any:
    plan = plan_for(STEERS, default=default).to_json()
    admit_and_set_cache_key(core_request, SimpleNamespace(additional_config={"steer": plan}))
    return core_request.cache_salt


def test_a_request_inside_the_layers_has_a_salt_that_carries_its_keys() -> None:
    salt = key(request({"push": 1, "walk": 2}))
    assert isinstance(salt, SteeredSalt)
    assert sorted(k.position for k in salt.keys) == [0, 2]


@pytest.mark.parametrize("steer", [None, "none", "word:3", "push:0", "push:1,push:-1"], ids=str)
def test_a_request_that_does_nothing_to_kv_keeps_its_salt(steer: Any) -> None:
    for salt in (None, "mine"):
        cache_key = key(request(steer, cache_salt=salt))
        assert cache_key == salt and not isinstance(cache_key, SteeredSalt)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        ("pull:1", "'pull' is unknown; steers: push, walk, word"),
        ({"push": {"layers": "1"}}, "steer push: layers 1 are not in this steer; it has 0,2"),
        ({"word": {"phase": "prompt"}}, "steer word acts at the LM head"),
    ],
    ids=str,
)
def test_the_engine_core_refuses_requests_that_the_frontend_should_have_refused(
    steer: Any, message: str
) -> None:
    core_request = request(steer, cache_salt="mine")
    with pytest.raises(RejectedSteer, match=message):
        key(core_request)
    assert core_request.cache_salt == "mine"


@pytest.mark.parametrize(
    "steer", ["push:1", {"walk": 2}, {"push": {"phase": "generation"}}], ids=str
)
def test_a_growing_prompt_with_cached_kv_cannot_be_steered_inside_the_layers(steer: Any) -> None:
    """Its keys and its phases are those of the first piece, its steers those of the last."""
    with pytest.raises(
        RejectedSteer, match=r"streaming input.*use steers at the LM head, or " r"steer 'none'"
    ):
        key(request(steer, resumable=True))
    assert isinstance(key(request(steer, resumable=False)), SteeredSalt)
    with pytest.raises(RejectedSteer, match="streaming input"):
        key(request(None, resumable=True), default="push")


@pytest.mark.parametrize("steer", [None, "none", "word:3"], ids=str)
def test_a_prompt_that_grows_can_be_steered_at_the_head(steer: Any) -> None:
    assert key(request(steer, resumable=True, cache_salt="mine")) == "mine"
