"""Dynamic strengths over HTTP: computed by a served model, and part of every kind of response."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from dynamic_reference import reference_generate

from vllm_steer import Steer, embedded
from vllm_steer.doses import Dose, Dynamic

PROMPT = [1, 40, 60, 90]
NEW_TOKENS = 8
REQUEST: dict[str, Any] = {
    "model": "base",
    "max_tokens": NEW_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "steer_strengths": True,
}
MESSAGES = [{"role": "user", "content": "Once upon a time"}]
TOLERANCE = 1e-3
"""Of strengths up to 2; the served model is float32, the reference float64."""


def dynamic(steer: str, maximum: float) -> Dose:
    return Dose(steer, maximum, phase="answer", dynamic=Dynamic(top_p=0.5, kl="plain"))


ASKS: dict[str, tuple[Dose, ...]] = {
    "a:dynamic": (dynamic("a", 2.0),),
    "c:dynamic:-1": (dynamic("c", -1.0),),
    "v:dynamic:2:0.5": (dynamic("v", 2.0),),
    "d:dynamic:1": (dynamic("d", 1.0),),
    "a:dynamic:1,v:dynamic:1": (dynamic("a", 1.0), dynamic("v", 1.0)),
    "v:dynamic,b:0.5": (dynamic("v", 2.0), Dose("b", 0.5)),
}
each_ask = pytest.mark.parametrize("steer", ASKS)


@cache
def model() -> Any:
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(
        embedded.MODEL, dtype=torch.float64
    ).eval()


def expected(tokens: list[int], steer: str, steers: dict[str, Steer]) -> dict[str, list[float]]:
    """The strengths of a request that wrote these tokens, which are its greedy choices."""
    trace = reference_generate(model(), PROMPT, ASKS[steer], steers, forced=tokens)
    assert trace.choices == tokens
    return trace.strengths


def ask(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The choices of a whole response."""
    reply = http.post(path, json={**REQUEST, **body})
    assert reply.status_code == 200, reply.text
    return list(reply.json()["choices"])


def events(http: httpx.Client, path: str, **body: Any) -> Iterator[dict[str, Any]]:
    with http.stream("POST", path, json={**REQUEST, **body, "stream": True}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def assert_strengths(actual: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert actual.keys() == expected.keys()
    for steer, strengths in expected.items():
        assert actual[steer] == pytest.approx(strengths, abs=TOLERANCE), steer


@each_ask
def test_a_completion_has_the_strengths_of_its_tokens(
    server: Any, http: httpx.Client, steer: str
) -> None:
    (choice,) = ask(http, prompt=PROMPT, steer=steer, return_token_ids=True)
    assert_strengths(choice["steer_strengths"], expected(choice["token_ids"], steer, server.steers))


@each_ask
def test_each_chunk_has_the_strengths_of_its_own_tokens(
    server: Any, http: httpx.Client, steer: str
) -> None:
    tokens: list[int] = []
    strengths: dict[str, list[float]] = {}
    for event in events(http, "/v1/completions", prompt=PROMPT, steer=steer, return_token_ids=True):
        for choice in event["choices"]:
            tokens += choice["token_ids"]
            for name, values in choice["steer_strengths"].items():
                assert len(values) == len(choice["token_ids"])
                strengths.setdefault(name, []).extend(values)
    assert_strengths(strengths, expected(tokens, steer, server.steers))


def test_concurrent_requests_get_their_own_strengths(server: Any, http: httpx.Client) -> None:
    with ThreadPoolExecutor(len(ASKS)) as pool:
        choices = list(
            pool.map(lambda s: ask(http, prompt=PROMPT, steer=s, return_token_ids=True), ASKS)
        )
    for steer, (choice,) in zip(ASKS, choices, strict=True):
        expected_strengths = expected(choice["token_ids"], steer, server.steers)
        assert_strengths(choice["steer_strengths"], expected_strengths)


def test_each_choice_of_several_prompts_has_its_own_strengths(
    server: Any, http: httpx.Client
) -> None:
    fixed = {"temperature": 1.0, "seed": 5, "n": 2, "return_token_ids": True}
    choices = ask(http, prompt=[PROMPT, PROMPT], steer="c:dynamic:-1", **fixed)
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice in choices:
        trace = reference_generate(
            model(), PROMPT, ASKS["c:dynamic:-1"], server.steers, forced=choice["token_ids"]
        )
        assert_strengths(choice["steer_strengths"], trace.strengths)


def test_chat_returns_the_same_strengths_whole_and_streamed(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "steer": "v:dynamic"}
    (choice,) = ask(http, "/v1/chat/completions", **body)
    assert len(choice["steer_strengths"]["v"]) == NEW_TOKENS
    streamed = [
        value
        for event in events(http, "/v1/chat/completions", **body)
        for chunk in event["choices"]
        for value in chunk["steer_strengths"].get("v", [])
    ]
    assert streamed == pytest.approx(choice["steer_strengths"]["v"], abs=TOLERANCE)


def test_responses_have_the_strengths_once(http: httpx.Client) -> None:
    body = {"model": "base", "input": "Once", "max_output_tokens": 4, "temperature": 0}
    request_body = {**body, "steer": "v:dynamic", "steer_strengths": True}
    reply = http.post("/v1/responses", json=request_body)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["steer_strengths"]["v"]) == 4
    last = list(events(http, "/v1/responses", **request_body))[-1]
    assert last["response"]["steer_strengths"]["v"] == pytest.approx(
        reply.json()["steer_strengths"]["v"], abs=TOLERANCE
    )


def test_the_sites_that_the_self_test_found_are_listed(http: httpx.Client) -> None:
    for _ in range(2):
        answer = http.get("/v1/steer_sites").json()
        layers = list(range(model().config.num_hidden_layers))
        every = {"proof": "compared", "layers": layers, "refused": {}}
        sites = dict.fromkeys(("attn_in", "heads", "attn_out", "resid"), every)
        assert answer == {"object": "steer_sites", "sites": sites}


def test_a_fixed_strength_is_not_reported(http: httpx.Client) -> None:
    (choice,) = ask(http, prompt=PROMPT, steer="a:3")
    assert choice["steer_strengths"] == {}


def test_a_request_without_steer_strengths_gets_none(http: httpx.Client) -> None:
    (choice,) = ask(http, prompt=PROMPT, steer="v:dynamic", steer_strengths=False)
    assert "steer_strengths" not in choice


def test_metrics_count_what_was_served(http: httpx.Client) -> None:
    def samples() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("vllm_steer_"))
        return {name: float(value) for name, value in pairs}

    ask(http, prompt=PROMPT, steer="d:dynamic:1")
    before = samples()
    (choice,) = ask(http, prompt=PROMPT, steer="d:dynamic:1")
    grown = {name: value - before[name] for name, value in samples().items()}
    strengths = choice["steer_strengths"]["d"]
    assert grown["vllm_steer_dynamic_requests_total"] == 1
    assert grown["vllm_steer_dynamic_tokens_total"] == NEW_TOKENS
    assert grown['vllm_steer_dynamic_strength_count{steer="d"}'] == NEW_TOKENS
    assert grown['vllm_steer_dynamic_strength_sum{steer="d"}'] == pytest.approx(sum(strengths))
    clipped = grown['vllm_steer_dynamic_clipped_tokens_total{steer="d"}']
    assert clipped == strengths.count(1.0) > 0


def test_a_steer_strengths_field_that_is_not_a_boolean_is_answered_with_400(
    http: httpx.Client,
) -> None:
    for stream in (False, True):
        body = {**REQUEST, "prompt": PROMPT, "steer_strengths": "yes", "stream": stream}
        reply = http.post("/v1/completions", json=body)
        assert reply.status_code == 400
        assert "expected true or false" in reply.json()["error"]["message"]
