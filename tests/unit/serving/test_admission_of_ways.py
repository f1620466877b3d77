"""Admission of requests with conditions and low-rank maps: what could not be served as asked."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guidance import head, plan_for, vector
from vllm import SamplingParams

from vllm_steer.config import Limits, SteerEntry
from vllm_steer.plan import SteerPlan
from vllm_steer.planned_steer import plan_loaded
from vllm_steer.serving.admission import admit, admit_and_set_cache_key
from vllm_steer.serving.cache_key import SteeredSalt
from vllm_steer.serving.request_args import RejectedSteer
from vllm_steer.steers import ConditionSteer, LowRankSteer, Steer

STEERS: dict[str, Steer] = {
    "push": vector((2,)),
    "spin": vector((1, 2), mode="rotate"),
    "word": head(),
    "map": LowRankSteer(a=torch.ones(2, 1, 5), b=torch.ones(2, 5, 1), layers=(2, 3)),
    "rude": ConditionSteer(vector=torch.ones(1, 5), layers=(1,), threshold=0.0),
    "long": ConditionSteer(vector=torch.ones(1, 5), layers=(1,), threshold=0.0, tokens="any"),
}


def plan() -> SteerPlan:
    entry = SteerEntry.model_validate({"path": "/steers/x.safetensors"})
    planned = {name: plan_loaded(name, entry, steer, Limits()) for name, steer in STEERS.items()}
    empty = plan_for({"push": STEERS["push"]})
    return empty.model_copy(update={"steers": planned})


CONFIG = SimpleNamespace(additional_config={"steer": plan().to_json()}, speculative_config=None)


def ask(steer: Any, **fields: Any) -> SamplingParams:
    return SamplingParams(extra_args={"steer": steer}, **fields)


@pytest.mark.parametrize(
    ("steer", "fields", "message"),
    [
        (
            {"push": {"strength": 1, "when": "rude"}, "word": "dynamic"},
            {},
            "push has 'when' beside a dynamic strength, which is computed in streams",
        ),
        (
            {"word": {"strength": 1, "when": "rude"}},
            {"prompt_logprobs": 1},
            "word has 'when'.* no prompt logprobs under it",
        ),
        (
            {"map": 1, "spin": 1},
            {},
            "map is a low-rank map and spin rotates at the same site resid of the same layers",
        ),
        ({"rude": 1}, {}, "rude is a condition, which changes nothing by itself"),
        (
            {"word": {"strength": 1, "when": "rude"}},
            {"prompt_logprob_token_ids": [[1], [2]]},
            "word has 'when'.* no prompt logprobs under it",
        ),
    ],
)
def test_what_could_not_be_served_as_asked_is_refused(
    steer: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RejectedSteer, match=message):
        admit(ask(steer, **fields), CONFIG)


@pytest.mark.parametrize(
    "steer",
    [
        {"map": 1, "spin": {"strength": 1, "layers": "1"}},
        {"map": {"strength": 1, "layers": "3"}, "spin": 1},
        {"map": 1, "push": 1},
        {"push": {"strength": 1, "when": {"all": ["rude", "long"]}}, "word": 2},
    ],
)
def test_what_does_not_meet_is_admitted(steer: Any) -> None:
    assert len(admit(ask(steer), CONFIG)) == 2


def core_request(steer: Any, **fields: Any) -> Any:
    given = {"prompt_token_ids": [1, 2, 3], "prompt_embeds": None, "cache_salt": None, **fields}
    return SimpleNamespace(sampling_params=ask(steer), mm_features=None, **given)


def test_a_prompt_that_grows_has_no_verdict() -> None:
    """Also where the gated steer changes no KV."""
    request = core_request({"word": {"strength": 1, "when": "rude"}}, resumable=True)
    with pytest.raises(RejectedSteer, match="conditions do not work with streaming input"):
        admit_and_set_cache_key(request, CONFIG)


def test_the_key_of_a_gated_steer_begins_with_the_answer_and_has_its_conditions() -> None:
    keys = {}
    for name, steer in {
        "plain": {"push": {"strength": 1, "phase": "answer"}},
        "rude": {"push": {"strength": 1, "when": "rude"}},
        "any": {"push": {"strength": 1, "when": {"any": ["rude", "long"]}}},
        "all": {"push": {"strength": 1, "when": {"all": ["rude", "long"]}}},
        "turned": {"push": {"strength": 1, "when": {"any": ["long", "rude"]}}},
    }.items():
        request = core_request(steer)
        admit_and_set_cache_key(request, CONFIG)
        assert isinstance(request.cache_salt, SteeredSalt)
        (key,) = request.cache_salt.keys
        assert key.position == 2  # the last of three tokens
        keys[name] = key.digest
    assert keys["any"] == keys["turned"]
    # The same token, and another end of the prompt: another verdict.
    shorter = core_request({"push": {"strength": 1, "when": "rude", "phase": "generation"}})
    shorter.prompt_token_ids = [1, 2]
    admit_and_set_cache_key(shorter, CONFIG)
    (key,) = shorter.cache_salt.keys
    assert key.position == 2 and key.digest not in keys.values()
    assert len(set(keys.values())) == len(keys) - 1
