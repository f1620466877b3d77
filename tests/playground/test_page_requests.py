"""The requests that the page shows: exactly what it sends, and they run as they are copied."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest
from page_tools import Playground
from playwright.sync_api import Page

pytestmark = pytest.mark.matrix
Open = Callable[..., Playground]
HARD = """It's "odd" $HOME `ls` \\n !x %s
second line — 🙂 <b>&amp;</b>"""
STEERS = "french:2.5,polite-praise:1,french-delta:dynamic:1.5"


def settings(api: str, prompt: str, more: str = "") -> str:
    return f"#prompt={quote(prompt)}&api={api}&max_tokens=24&steer={STEERS}{more}"


def run(*command: str, folder: Path) -> str:
    """Run in an environment without keys and proxies; returns the output."""
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(folder)}
    process = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def streamed_text(events: str) -> str:
    """The text in the server-sent events of a completion or of a chat."""
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line]
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


@pytest.mark.parametrize("api", ["completion", "chat"])
@pytest.mark.parametrize("prompt", ["Hotel Astoria:", HARD], ids=["plain", "hard"])
def test_the_copied_curl_runs_in_a_shell_and_gives_the_text_of_the_page(
    open_page: Open, api: str, prompt: str, tmp_path: Path
) -> None:
    playground = open_page(settings(api, prompt)).ready()
    playground.generate()
    command = playground.sample("curl")
    assert streamed_text(run("bash", "-c", command, folder=tmp_path)) == playground.text("steered")
    words = shlex.split(command)
    sent = playground.sent[-1]
    assert words[words.index("-d") + 1] == sent.post_data
    assert sent.url in words


@pytest.mark.parametrize("api", ["completion", "chat"])
@pytest.mark.parametrize("prompt", ["Hotel Astoria:", HARD], ids=["plain", "hard"])
def test_the_copied_python_runs_and_gives_the_text_of_the_page(
    open_page: Open, api: str, prompt: str, tmp_path: Path
) -> None:
    playground = open_page(settings(api, prompt)).ready()
    playground.generate()
    program = playground.sample("Python")
    assert run(sys.executable, "-c", program, folder=tmp_path) == playground.text("steered") + "\n"


@pytest.mark.parametrize("api", ["completion", "chat"])
def test_the_copied_json_is_the_body_that_was_sent(
    open_page: Open, api: str, server_url: str
) -> None:
    playground = open_page(settings(api, HARD, "&temperature=0.7&seed=3")).ready()
    playground.generate()
    copied = playground.sample("JSON")
    assert copied == playground.sent[-1].post_data
    prompt = (
        {"prompt": HARD}
        if api == "completion"
        else {"messages": [{"role": "user", "content": HARD}]}
    )
    assert json.loads(copied) == {
        "model": "embedded",
        **prompt,
        "max_tokens": 24,
        "temperature": 0.7,
        "seed": 3,
        "stream": True,
        "steer": {
            "french": 2.5,
            "polite-praise": 1,
            "french-delta": {"strength": "dynamic", "max": 1.5},
        },
        "steer_strengths": True,
    }
    unsteered = json.loads(playground.sent[0].post_data or "")
    without = {name: value for name, value in json.loads(copied).items()}
    del without["steer_strengths"]
    assert unsteered == {**without, "steer": "none"}


def test_an_api_key_is_sent_and_never_copied(open_page: Open) -> None:
    playground = open_page(settings("completion", "Hotel Astoria:")).ready()
    page = playground.page
    page.get_by_text("API key", exact=True).click()
    page.locator("#api-key").fill("s3cret'key")
    playground.generate()
    assert playground.sent[-1].headers["authorization"] == "Bearer s3cret'key"
    curl, python = playground.sample("curl"), playground.sample("Python")
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in curl
    assert 'api_key=os.environ["VLLM_API_KEY"]' in python
    shown = page.url + curl + python + page.content()
    assert "s3cret" not in shown
    stored = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
    assert "s3cret" not in stored


def test_copying_works_on_a_page_without_tls(open_page: Open) -> None:
    def without_clipboard(page: Page) -> None:
        page.add_init_script("navigator.clipboard.writeText = () => Promise.reject(Error())")

    playground = open_page(settings("chat", HARD), prepare=without_clipboard).ready()
    assert playground.sample("curl") == playground.page.locator("#code").text_content()


def test_a_link_to_the_settings_restores_them(open_page: Open) -> None:
    first = open_page(settings("completion", HARD, "&temperature=0.5&seed=7")).ready()
    first.set("german", -1.25)
    first.page.get_by_role("button", name="Copy link to these settings").click()
    link = first.page.evaluate("navigator.clipboard.readText()")
    second = open_page(f"#{urlsplit(link).fragment}").ready()
    for name in ("#prompt", "#max-tokens", "#temperature", "#seed", "#model"):
        assert second.page.input_value(name) == first.page.input_value(name)
    assert second.sample("JSON") == first.sample("JSON")
    assert second.page.get_by_label("Completion").is_checked()


def test_a_fragment_that_makes_no_sense_is_ignored(open_page: Open) -> None:
    playground = open_page(
        "#steer=nosuch:3,french:NaN,german:1e999,spanish:dynamic,:5,,sentiment:2:3&api=x"
        "&max_tokens=many&model=other&prompt=%3Cimg%20src=x%20onerror=alert(1)%3E"
    ).ready()
    assert json.loads(playground.sample("JSON"))["steer"] == "none"
    assert playground.page.input_value("#prompt") == "<img src=x onerror=alert(1)>"
    assert playground.page.input_value("#model") == "embedded"


def test_the_page_itself_needs_no_key_and_is_the_same_for_all(server_url: str) -> None:
    one, other = (httpx.get(f"{server_url}/steer") for _ in range(2))
    assert one.status_code == 200 and one.content == other.content
    assert "set-cookie" not in one.headers
