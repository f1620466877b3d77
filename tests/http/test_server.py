"""A served model with every documented form of an HTTP request."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from asking import BASE, GREEDY, NEW_TOKENS, PROMPT

from vllm_steer import embedded, hf
from vllm_steer.steers.content import content_digest

Ask = Callable[..., str]


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def completion(client: openai.OpenAI, model: str = BASE, **extra: Any) -> str:
    response = client.completions.create(model=model, prompt=PROMPT, extra_body=extra, **GREEDY)
    return response.choices[0].text


def streamed_completion(client: openai.OpenAI, model: str = BASE, **extra: Any) -> str:
    chunks = client.completions.create(
        model=model, prompt=PROMPT, extra_body=extra, stream=True, **GREEDY
    )
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def chat(client: openai.OpenAI, model: str = BASE, **extra: Any) -> str:
    response = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": PROMPT}], extra_body=extra, **GREEDY
    )
    return response.choices[0].message.content or ""


def streamed_chat(client: openai.OpenAI, model: str = BASE, **extra: Any) -> str:
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        extra_body=extra,
        stream=True,
        **GREEDY,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


ASKS = {
    "completions": completion,
    "completions-streamed": streamed_completion,
    "chat": chat,
    "chat-streamed": streamed_chat,
}
ask_in_every_way = pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)


@ask_in_every_way
def test_every_way_to_request_a_steer_gives_the_same_steered_text(
    client: openai.OpenAI, ask: Ask
) -> None:
    ways = {
        "xargs": ask(client, vllm_xargs={"steer": "a:3"}),
        "xargs with JSON": ask(client, vllm_xargs={"steer": '{"a": 3}'}),
        "field": ask(client, steer="a:3"),
        "nested field": ask(client, steer={"a": {"strength": 3}}),
        "preset": ask(client, steer="friendly"),
        "preset as the model": ask(client, model=f"{BASE}:friendly"),
    }
    assert len(set(ways.values())) == 1, ways
    assert ways["xargs"] != ask(client)


@ask_in_every_way
@pytest.mark.parametrize("none", ["none", "", {}, "a:0", None], ids=repr)
def test_a_request_without_a_steer_gives_the_unsteered_text(
    client: openai.OpenAI, ask: Ask, none: Any
) -> None:
    assert ask(client, steer=none) == ask(client)


def test_streamed_and_whole_texts_agree(client: openai.OpenAI) -> None:
    assert streamed_completion(client, steer="c:4") == completion(client, steer="c:4")
    assert streamed_chat(client, steer="c:4") == chat(client, steer="c:4")


MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"a": 3.0},
    {"a": -3.0},
    {"b": 2.0},
    {"c": 3.0},
    {"a": 1.0, "c": -2.0},
    {"b": -1.0, "a": 2.0},
    {"a": 0.0},
    {"v": 1.5},
    {"v": {"strength": -1.5, "layers": "2", "phase": "generation"}},
    {"d": {"strength": 1.0, "schedule": "dim"}, "a": 2.0},
)


def token_ids(http: httpx.Client, prompt: list[int], doses: dict[str, Any]) -> list[int]:
    body = {
        "model": BASE,
        "prompt": prompt,
        "steer": doses,
        "return_token_ids": True,
        "ignore_eos": True,
        **GREEDY,
    }
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["choices"][0]["token_ids"])


def test_a_dict_in_the_arguments_equals_one_in_the_body(http: httpx.Client) -> None:
    ask = {"model": BASE, "prompt": "a", "max_tokens": 8, "temperature": 0}
    bodies = [{"vllm_xargs": {"steer": {"a": 3}}}, {"steer": {"a": 3}}, {}]
    texts = [
        http.post("/v1/completions", json=ask | body).json()["choices"][0]["text"]
        for body in bodies
    ]
    assert texts[0] == texts[1] != texts[2]


def test_each_request_of_a_mixed_batch_equals_hugging_face(server: Any, http: httpx.Client) -> None:
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        embedded.MODEL, dtype=torch.float32
    ).eval()
    prompts = [[1, 40 + 7 * n, 60 + n, 90] for n in range(len(MIXED))]
    with ThreadPoolExecutor(len(MIXED)) as pool:
        results = list(pool.map(lambda p, d: token_ids(http, p, d), prompts, MIXED))
    for prompt, doses, tokens in zip(prompts, MIXED, results, strict=True):
        steered = hf.steered(model, doses, server.steers, prompt_length=len(prompt))
        with steered, torch.inference_mode():
            expected = list(prompt)
            for _ in range(NEW_TOKENS):
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert tokens == expected[len(prompt) :], doses


@pytest.mark.parametrize(
    ("fields", "extra_args", "doses"),
    [
        ({}, None, {}),
        ({"steer": {"a": 3}}, None, {"a": 3}),
        ({}, {"steer": {"a": 3}}, {"a": 3}),
        ({"model": f"{BASE}:friendly"}, {"x": 1}, {"a": 3}),
    ],
    ids=["none", "field", "extra-args", "preset"],
)
def test_the_token_route_steers(
    http: httpx.Client,
    fields: dict[str, Any],
    extra_args: dict[str, Any] | None,
    doses: dict[str, Any],
) -> None:
    prompt = [1, 47, 61, 90]
    params = {
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "extra_args": extra_args,
    }
    body = {"model": BASE, "token_ids": prompt, "sampling_params": params, **fields}
    reply = http.post("/inference/v1/generate", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["token_ids"] == token_ids(http, prompt, doses)


def test_a_batch_of_prompts_in_one_request_is_steered_as_a_whole(client: openai.OpenAI) -> None:
    response = client.completions.create(
        model=BASE, prompt=[PROMPT] * 3, extra_body={"steer": "a:3"}, **GREEDY
    )
    assert {choice.text for choice in response.choices} == {completion(client, steer="a:3")}


def test_presets_are_listed_as_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [BASE, f"{BASE}:friendly", f"{BASE}:mix"]


def test_a_request_can_override_the_preset_of_its_model(client: openai.OpenAI) -> None:
    assert completion(client, f"{BASE}:friendly", steer="none") == completion(client)
    assert completion(client, f"{BASE}:friendly", vllm_xargs={"steer": "b:2"}) == completion(
        client, steer="b:2"
    )


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": NEW_TOKENS},
            lambda reply: reply["content"][0]["text"],
        ),
        (
            "/v1/responses",
            {"input": PROMPT, "max_output_tokens": NEW_TOKENS},
            lambda reply: reply["output"][-1]["content"][0]["text"],
        ),
        (
            "/v1/chat/completions/batch",
            {"messages": [[{"role": "user", "content": PROMPT}]], "max_tokens": NEW_TOKENS},
            lambda reply: reply["choices"][0]["message"]["content"],
        ),
        (
            "/invocations",
            {"prompt": PROMPT, "max_tokens": NEW_TOKENS},
            lambda reply: reply["choices"][0]["text"],
        ),
    ],
    ids=["messages", "responses", "chat-batch", "invocations"],
)
def test_other_routes_that_generate_take_a_steer(
    http: httpx.Client, path: str, body: dict[str, Any], read: Callable[[Any], str]
) -> None:
    def ask(**extra: Any) -> str:
        reply = http.post(path, json={"model": BASE, "temperature": 0, **body, **extra})
        assert reply.status_code == 200, reply.text
        return read(reply.json())

    assert ask(steer="a:3") == ask(model=f"{BASE}:friendly") != ask(steer="none") == ask()


def test_a_body_in_chunks_is_steered_like_a_whole_one(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": PROMPT, "steer": "a:3", **GREEDY}
    whole = http.post("/v1/completions", json=body)
    data = json.dumps(body).encode()
    pieces = (data[at : at + 7] for at in range(0, len(data), 7))
    chunked = http.post(
        "/v1/completions", content=pieces, headers={"content-type": "application/json"}
    )
    assert chunked.json()["choices"][0]["text"] == whole.json()["choices"][0]["text"]


def test_prompt_logprobs_are_steered_and_the_first_is_absent(http: httpx.Client) -> None:
    def logprobs(**extra: Any) -> list[Any]:
        body = {"model": BASE, "prompt": [1, 50, 60, 70], "max_tokens": 1, "prompt_logprobs": 0}
        reply = http.post("/v1/completions", json={**body, **extra})
        assert reply.status_code == 200, reply.text
        return list(reply.json()["choices"][0]["prompt_logprobs"])

    plain, steered, none = logprobs(), logprobs(steer="a:3"), logprobs(steer="none")
    assert plain[0] is steered[0] is None
    assert plain == none
    assert all(a != b for a, b in zip(plain[1:], steered[1:], strict=True))


def test_a_steered_request_leaves_no_trace_in_the_next(client: openai.OpenAI) -> None:
    before = completion(client)
    assert completion(client, steer="a:8") != before
    assert completion(client) == before


def test_every_answer_says_what_was_applied(server: Any, http: httpx.Client) -> None:
    digests = {name: content_digest(steer)[:12] for name, steer in server.steers.items()}
    body = {"model": BASE, "prompt": PROMPT, **GREEDY}
    chat_body = {"model": BASE, "messages": [{"role": "user", "content": PROMPT}], **GREEDY}
    a, c = digests["a"], digests["c"]
    for path, fields, expected in (
        ("/v1/completions", {**body, "steer": "a:2.5,c:-1"}, f"a:2.5@{a},c:-1@{c}"),
        ("/v1/completions", {**body, "steer": "a:2.5", "stream": True}, f"a:2.5@{a}"),
        ("/v1/completions", {**body, "model": f"{BASE}:friendly"}, f"a:3@{a}"),
        ("/v1/chat/completions", {**chat_body, "steer": {"a": 1}, "stream": True}, f"a:1@{a}"),
        ("/v1/chat/completions", chat_body, "none"),
        ("/v1/completions", {**body, "steer": "unknown"}, "none"),
    ):
        response = http.post(path, json=fields)
        assert response.headers["X-Steer"] == expected
    assert http.get("/health").headers["X-Steer"] == "none"
    assert http.get("/no/such/route").headers["X-Steer"] == "none"
