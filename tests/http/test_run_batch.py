"""One real ``vllm run-batch`` of a file with every form of a steer, and with bad ones."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from asking import BASE, GREEDY, NEW_TOKENS, PROMPT
from server_process import environment, random_steers, tail, write_config

from vllm_steer import embedded, hf

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.matrix

SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "field": ({"steer": "a:3"}, {"a": 3}),
    "object": ({"steer": {"v": {"strength": 6}}}, {"v": 6}),
    "arguments": ({"vllm_xargs": {"steer": "b:2"}}, {"b": 2}),
    "object-in-arguments": ({"vllm_xargs": {"steer": {"b": 2}}}, {"b": 2}),
    "preset": ({"model": f"{BASE}:friendly"}, {"a": 3}),
    "preset-overridden": ({"model": f"{BASE}:friendly", "steer": "none"}, {}),
}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"steer": "happy:1"}, "steer", "steer 'happy' is unknown; steers: a, b, c, d, v"),
    "too-strong": (
        {"vllm_xargs": {"steer": "a:11"}},
        "vllm_xargs.steer",
        "steer a has strength 11; allowed: -10 to 10",
    ),
    "twice": ({"steer": "a:1", "vllm_xargs": {"steer": "a:1"}}, "steer", "give it once"),
    "misspelled": ({"steers": "a:1"}, "steers", "use steer"),
    "stream-argument": (
        {"vllm_xargs": {"vllm_steer_stream": "x"}},
        "vllm_xargs.vllm_steer_stream",
        "reserved",
    ),
}


def line(custom_id: str, fields: dict[str, Any], **beside_the_body: Any) -> str:
    body = {"model": BASE, "messages": [{"role": "user", "content": PROMPT}], **GREEDY, **fields}
    request = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}
    return json.dumps(request | beside_the_body)


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The entries of the output file, by ``custom_id``."""
    folder = tmp_path_factory.mktemp("batch")
    config = write_config(folder, random_steers())
    lines = [line(name, fields) for name, (fields, _) in SERVED.items()]
    lines += [line(name, fields) for name, (fields, _, _) in REFUSED.items()]
    lines.append(line("beside", {}, steer="a:3"))
    lines.append(line("strengths", {"steer": "d:dynamic:2", "steer_strengths": True}))
    (folder / "in.jsonl").write_text("\n".join(lines))
    log, output = folder / "log", folder / "out.jsonl"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch"]
    command += ["-i", str(folder / "in.jsonl"), "-o", str(output), "--model", str(embedded.MODEL)]
    command += ["--dtype=float32", "--enforce-eager", "--max-model-len=256", "--max-num-seqs=16"]
    command += [f"--steer-config={config}", f"--served-model-name={BASE}"]
    with log.open("wb") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(), timeout=240
        ).returncode
    assert code == 0, tail(log)
    read = map(json.loads, output.read_text().splitlines())
    return {entry["custom_id"]: entry for entry in read}


def expected_text(doses: dict[str, float]) -> str:
    """The greedy answer of a steered Hugging Face model."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.MODEL)
    messages = [{"role": "user", "content": PROMPT}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
    tokens = list(prompt)
    steered = hf.steered(model.eval(), doses, random_steers(), prompt_length=len(prompt))
    with steered, torch.inference_mode():
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return str(tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True))


@pytest.mark.parametrize("name", SERVED)
def test_a_line_is_steered_as_it_asks(entries: dict[str, Any], name: str) -> None:
    response = entries[name]["response"]
    assert response["status_code"] == 200, entries[name]
    text = response["body"]["choices"][0]["message"]["content"]
    assert text == expected_text(SERVED[name][1])


def test_steered_lines_differ_from_the_unsteered_one(entries: dict[str, Any]) -> None:
    texts = {
        name: entries[name]["response"]["body"]["choices"][0]["message"]["content"]
        for name in ("none", "field", "object", "arguments")
    }
    assert len(set(texts.values())) == 4


@pytest.mark.parametrize("name", REFUSED)
def test_a_line_with_a_bad_steer_gets_an_error_entry(entries: dict[str, Any], name: str) -> None:
    _, parameter, message = REFUSED[name]
    assert_refused(entries[name], parameter, message)


def test_a_steer_beside_the_body_gets_an_error_entry(entries: dict[str, Any]) -> None:
    assert_refused(entries["beside"], "steer", "put it into the body")


def test_a_line_may_ask_for_its_strengths(entries: dict[str, Any]) -> None:
    choice = entries["strengths"]["response"]["body"]["choices"][0]
    assert len(choice["steer_strengths"]["d"]) == NEW_TOKENS
    assert any(choice["steer_strengths"]["d"])


def assert_refused(entry: dict[str, Any], parameter: str, message: str) -> None:
    assert entry["response"]["status_code"] == 400, entry
    assert entry["response"]["body"] is None
    error = entry["error"]["error"]
    assert (error["param"], error["code"]) == (parameter, 400)
    assert message in error["message"]
