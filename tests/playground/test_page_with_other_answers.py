"""The page before answers that the embedded model's server does not give: they are made here."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_tools import Playground
from playwright.sync_api import Page, Request, Route, expect

pytestmark = pytest.mark.matrix
Open = Callable[..., Playground]
STEER = {
    "id": "cheer",
    "object": "steer",
    "kind": "vector",
    "site": "resid",
    "layers": "3-5,9",
    "mode": "add",
    "default_strength": 2.0,
    "limit": 6.0,
    "digest": "0" * 64,
    "source": "config",
    "in_use": None,
}
LOADED = {**STEER, "id": "mine", "source": "runtime", "in_use": 0}


def answered(data: Any, status: int = 200, **headers: str) -> Callable[[Route], None]:
    def fulfil(route: Route) -> None:
        body = data if isinstance(data, str) else json.dumps(data)
        kind = "text/event-stream" if isinstance(data, str) else "application/json"
        route.fulfill(status=status, body=body, headers={"content-type": kind, **headers})

    return fulfil


def listing(*entries: Any, runtime: bool = False) -> Callable[[Route], None]:
    return answered({"object": "list", "runtime": runtime, "data": list(entries)})


def events(*choices: dict[str, Any]) -> str:
    lines = [json.dumps({"choices": [{"index": 0, **choice}]}) for choice in choices]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])


def routes(**handlers: Callable[[Route], None]) -> Callable[[Page], None]:
    """Answers of the server by the last part of the path, with ``_`` for ``/``."""

    def prepare(page: Page) -> None:
        for name, handler in handlers.items():
            page.route(f"**/{name.replace('__', '/')}", handler)

    return prepare


def test_a_limit_is_the_end_of_the_slider_and_of_the_number(open_page: Open) -> None:
    playground = open_page(prepare=routes(v1__steers=listing(STEER))).ready()
    slider, number = playground.slider("cheer"), playground.number("cheer")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("-6", "6")
    assert (number.get_attribute("min"), number.get_attribute("max")) == ("-6", "6")
    expect(
        playground.page.get_by_text("vector, at resid, layers 3-5,9, add, limit 6")
    ).to_be_visible()
    assert not playground.page.get_by_role("heading", name="Presets").is_visible()


def test_the_header_with_the_steers_is_shown_under_the_steered_answer(open_page: Open) -> None:
    stream = events({"text": "Bonjour"}, {"text": " !", "finish_reason": "stop"})
    header = {"x-steer": "french:5@0123456789ab"}
    prepare = routes(v1__completions=answered(stream, **header))
    playground = open_page("#api=completion&steer=french:5", prepare=prepare).ready()
    playground.generate()
    assert playground.text("steered") == "Bonjour !"
    expect(playground.page.locator("#steered")).to_contain_text("X-Steer: french:5@0123456789ab")
    expect(playground.page.locator("#steered .status")).to_contain_text("Complete, ")


def test_markup_in_an_answer_is_text(open_page: Open) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    prepare = routes(v1__completions=answered(events({"text": markup})))
    playground = open_page("#api=completion", prepare=prepare).ready()
    playground.generate()
    assert playground.text("steered") == markup
    assert playground.page.locator("main img, main script").count() == 0


def test_the_thinking_of_a_chat_is_shown_apart(open_page: Open) -> None:
    stream = events(
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"reasoning": "Let me see."}},
        {"delta": {"content": "Two."}, "finish_reason": "stop"},
    )
    playground = open_page("#api=chat", prepare=routes(v1__chat__completions=answered(stream)))
    playground.ready().generate()
    assert playground.page.locator("#steered .reasoning").all_text_contents() == ["Let me see."]
    assert playground.text("steered") == "Two."


def test_strengths_that_come_before_their_text_are_shown_with_it(open_page: Open) -> None:
    stream = events(
        {"text": "", "steer_strengths": {"cheer": [0.5]}},
        {"text": "é", "steer_strengths": {"cheer": [1.5]}},
    )
    prepare = routes(v1__steers=listing(STEER), v1__completions=answered(stream))
    playground = open_page("#api=completion&steer=cheer:dynamic:2", prepare=prepare).ready()
    playground.generate()
    token = playground.page.locator("#steered .token")
    assert token.get_attribute("title") == "cheer 0.50, 1.50"
    assert token.get_attribute("class") == "token level-4"


@pytest.mark.expects_errors
@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            400,
            {"error": {"message": "steer cheer: too much", "code": 400}},
            "steer cheer: too much",
        ),
        (401, {"error": "Unauthorized"}, "Unauthorized"),
        (404, {"detail": "Not Found"}, "Not Found"),
        (500, "Internal Server Error", "Internal Server Error"),
        (503, "", "HTTP 503"),
        (
            200,
            "data: " + json.dumps({"error": {"message": "the engine died"}}) + "\n\n",
            "the engine died",
        ),
    ],
    ids=["openai", "key", "fastapi", "text", "empty", "event"],
)
def test_errors_of_every_form_are_shown_once(
    open_page: Open, status: int, body: Any, message: str
) -> None:
    prepare = routes(v1__completions=answered(body, status))
    playground = open_page("#api=completion&steer=french:5", prepare=prepare).ready()
    playground.generate()
    expect(playground.page.get_by_role("alert")).to_have_text(message)
    expect(playground.page.locator("#steered .status")).to_contain_text("Failed")


@pytest.mark.expects_errors
def test_a_server_that_is_gone_is_said_to_be(open_page: Open) -> None:
    prepare = routes(v1__completions=lambda route: route.abort())
    playground = open_page("#api=completion", prepare=prepare).ready()
    playground.generate()
    assert playground.problem() == "The server does not answer. Is it still running?"


@pytest.mark.expects_errors
def test_a_server_with_a_key_asks_for_it_and_then_lists_its_steers(open_page: Open) -> None:
    def guarded(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            listing(STEER)(route)
        else:
            answered({"error": "Unauthorized"}, 401)(route)

    playground = open_page("#steer=cheer:3", prepare=routes(v1__steers=guarded))
    expect(playground.page.get_by_role("alert")).to_have_text("Unauthorized")
    playground.page.locator("#api-key").fill("right")
    playground.page.get_by_role("button", name="Use", exact=True).click()
    expect(playground.number("cheer")).to_have_value("3")
    assert playground.problem() == ""


@pytest.mark.expects_errors
def test_a_model_without_a_chat_template_has_completions_only(open_page: Open) -> None:
    error = answered({"error": {"message": "no chat template"}}, 400)
    playground = open_page("#api=chat", prepare=routes(tokenize=error)).ready()
    assert playground.page.get_by_label("Chat", exact=True).is_disabled()
    assert playground.page.get_by_label("Completion").is_checked()
    expect(playground.page.get_by_text("This model has no chat template.")).to_be_visible()


class Loading:
    """A server that loads steers while it runs."""

    def __init__(self) -> None:
        self.entries: list[Any] = [STEER]
        self.changes: list[Request] = []

    def steers(self, route: Route) -> None:
        listing(*self.entries, runtime=True)(route)

    def load(self, route: Route) -> None:
        self.changes.append(route.request)
        name = (route.request.post_data_json or {})["steer_name"]
        if any(entry["id"] == name for entry in self.entries):
            message = f"steer {name} is loaded already"
            return answered({"error": {"message": message}}, 409)(route)
        self.entries.append({**LOADED, "id": name})
        answered(self.entries[-1])(route)

    def unload(self, route: Route) -> None:
        self.changes.append(route.request)
        name = (route.request.post_data_json or {})["steer_name"]
        self.entries = [entry for entry in self.entries if entry["id"] != name]
        answered({})(route)

    def prepare(self, page: Page) -> None:
        routes(v1__steers=self.steers, v1__load_steer=self.load, v1__unload_steer=self.unload)(page)


DROP = """
(bytes) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], 'my steer (2).safetensors'));
  for (const type of ['dragover', 'drop']) {
    const event = new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
    document.querySelector('main').dispatchEvent(event);
  }
}
"""
CONTENT = bytes(range(256)) * 3


def test_a_chosen_file_is_loaded_listed_and_unloaded(open_page: Open, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CONTENT)
    loading = Loading()
    playground = open_page("#steer=cheer:3", prepare=loading.prepare).ready()
    playground.page.get_by_label("Key for changes").fill("key of changes")
    with playground.page.expect_file_chooser() as chooser:
        playground.page.get_by_role("button", name="Choose a file").click()
    chooser.value.set_files(path)
    expect(playground.slider("mine")).to_be_visible()
    expect(playground.page.locator("#load-status")).to_have_text("Loaded mine.")
    (sent,) = loading.changes
    assert sent.headers["authorization"] == "Bearer key of changes"
    assert sent.post_data_json == {
        "steer_name": "mine",
        "steer_data": base64.b64encode(CONTENT).decode(),
    }
    assert playground.number("cheer").input_value() == "3"
    assert playground.page.get_by_role("button", name="Unload cheer").count() == 0
    playground.page.get_by_role("button", name="Unload mine").click()
    expect(playground.slider("mine")).to_have_count(0)
    assert loading.changes[-1].post_data_json == {"steer_name": "mine"}


@pytest.mark.expects_errors
def test_a_dropped_file_is_loaded_and_a_refusal_shown(open_page: Open) -> None:
    loading = Loading()
    playground = open_page(prepare=loading.prepare).ready()
    playground.page.evaluate(DROP, list(CONTENT))
    expect(playground.slider("my-steer-2-")).to_be_visible()
    assert "authorization" not in loading.changes[0].headers
    playground.page.evaluate(DROP, list(CONTENT))
    alert = playground.page.get_by_role("alert")
    expect(alert).to_have_text("steer my-steer-2- is loaded already")


def test_without_run_time_nothing_can_be_loaded(open_page: Open) -> None:
    playground = open_page().ready()
    assert not playground.page.get_by_text("Load a steer file").is_visible()
    playground.page.evaluate(DROP, [1])
    assert playground.page.get_by_role("alert").text_content() == ""
