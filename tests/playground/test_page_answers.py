"""The page against a served model: answers side by side, streamed, shaded and stopped."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from page_tools import Playground

from vllm_steer.embedded import lexicon

pytestmark = pytest.mark.matrix
Open = Callable[..., Playground]
AS_COMPLETION = "#prompt=Hotel+Astoria:&api=completion&max_tokens=40"


def test_the_page_shows_every_steer_and_preset_of_the_server(
    open_page: Open, server_url: str
) -> None:
    playground = open_page().ready()
    entries = httpx.get(f"{server_url}/v1/steers").json()["data"]
    for entry in entries:
        assert playground.slider(entry["id"]).count() == 1
        assert playground.number(entry["id"]).input_value() == "0"
    assert playground.page.locator("#model option").all_text_contents() == ["embedded"]


def test_a_slider_gives_another_text_than_the_model_alone(open_page: Open) -> None:
    playground = open_page().ready()
    playground.slider("french").fill("5")
    playground.generate()
    unsteered, steered = playground.text("unsteered"), playground.text("steered")
    assert lexicon.language(unsteered) == "en" and lexicon.language(steered) == "fr"
    assert playground.page.locator("#steered .status").text_content().startswith("Stopped at max")


def test_without_a_steer_both_answers_are_the_same(open_page: Open) -> None:
    playground = open_page(AS_COMPLETION).ready()
    playground.generate()
    assert playground.text("steered") == playground.text("unsteered") != ""
    assert [json.loads(sent.post_data)["steer"] for sent in playground.sent] == ["none", "none"]


def test_the_texts_are_those_of_the_same_requests_without_streaming(
    open_page: Open, server_url: str
) -> None:
    playground = open_page(f"{AS_COMPLETION}&steer=french:5,sentiment:-2.5").ready()
    playground.generate()
    for name, sent in zip(("unsteered", "steered"), playground.sent, strict=True):
        body = {**json.loads(sent.post_data), "stream": False}
        (choice,) = httpx.post(sent.url, json=body, timeout=60).json()["choices"]
        assert playground.text(name) == choice["text"]


OBSERVE = """
() => {
  window.seen = [];
  const text = document.querySelector('#steered .text');
  new MutationObserver(() => {
    window.seen.push([performance.now(), text.textContent.length]);
  }).observe(text, { childList: true });
}
"""


def test_an_answer_arrives_in_parts(open_page: Open) -> None:
    playground = open_page("#prompt=Hotel+Astoria:&max_tokens=200&steer=french:5").ready()
    playground.page.evaluate(OBSERVE)
    playground.generate()
    seen = playground.page.evaluate("window.seen")
    lengths = [length for _, length in seen if length]
    assert lengths == sorted(lengths) and len(set(lengths)) > 10
    assert seen[-1][0] - seen[1][0] > 20  # ms: shown while the answer was still being written


STOP_AT_FIRST_TEXT = """
() => {
  const text = document.querySelector('#unsteered .text');
  new MutationObserver((changes, observer) => {
    if (!text.querySelector('.token')) return;
    observer.disconnect();
    document.querySelector('#stop').click();
  }).observe(text, { childList: true });
}
"""


def test_stop_ends_both_answers_and_keeps_their_text(open_page: Open) -> None:
    playground = open_page("#prompt=Hotel+Astoria:&max_tokens=240&steer=french-delta:dynamic:2")
    playground.ready().page.evaluate(STOP_AT_FIRST_TEXT)
    playground.generate()
    for name in ("unsteered", "steered"):
        assert "Stopped," in playground.page.locator(f"#{name} .status").text_content()
    assert playground.text("unsteered") != ""
    assert playground.problem() == ""
    assert playground.page.get_by_role("button", name="Stop").is_disabled()


def test_a_dynamic_strength_is_shown_as_shade_title_and_table(
    open_page: Open, server_url: str
) -> None:
    playground = open_page(AS_COMPLETION).ready()
    playground.dynamic("french-delta").check()
    assert playground.number("french-delta").input_value() == "2"
    playground.generate()
    body = playground.last_sent()
    assert body["steer"] == {"french-delta": {"strength": "dynamic", "max": 2}}
    whole = httpx.post(f"{server_url}/v1/completions", json={**body, "stream": False}, timeout=60)
    expected = whole.json()["choices"][0]["steer_strengths"]["french-delta"]

    tokens = playground.page.locator("#steered .token")
    titles = tokens.evaluate_all("spans => spans.map((span) => span.title)")
    shown = [float(text) for title in titles for text in re.findall(r"\d\.\d\d", title)]
    assert shown == pytest.approx(expected[: len(shown)], abs=0.006)
    assert len(shown) >= len(expected) - 1  # the last token may complete no character

    levels = [int(name.rpartition("-")[2]) for name in classes(tokens)]
    each = [re.findall(r"\d\.\d\d", title) for title in titles]  # a part may have several tokens
    for level, strength in zip(levels, (max(map(float, some)) for some in each), strict=True):
        assert abs(level - math.ceil(strength / 2 * 5)) <= (0 if strength > 0.01 else 1)
    assert max(levels) >= 4 and min(levels) <= 1

    playground.page.get_by_text("Strengths, token by token").click()
    cells = playground.page.locator("#strength-table td").all_text_contents()
    assert [cell.split(", ") for cell in cells] == each
    legend = playground.page.locator("#scale")
    assert legend.get_attribute("aria-label") == "Shades from 0 to 2"


def classes(tokens: Any) -> list[str]:
    names: list[str] = tokens.evaluate_all("spans => spans.map((span) => span.className)")
    return names


def test_two_dynamic_strengths_can_be_shown_one_by_one(open_page: Open) -> None:
    steer = "&steer=french-delta:dynamic:2,sentiment:dynamic:5"
    playground = open_page(AS_COMPLETION + steer).ready()
    playground.generate()
    tokens = playground.page.locator("#steered .token")
    options = playground.page.locator("#shaded option").all_text_contents()
    assert options == ["the strongest steer", "french-delta", "sentiment"]
    strongest = classes(tokens)
    playground.page.locator("#shaded").select_option("sentiment")
    sentiment = classes(tokens)
    playground.page.locator("#shaded").select_option("french-delta")
    french = classes(tokens)
    assert french != sentiment
    assert strongest == [max(pair) for pair in zip(french, sentiment, strict=True)]


def test_a_fixed_strength_has_no_shade(open_page: Open) -> None:
    playground = open_page(f"{AS_COMPLETION}&steer=french:5").ready()
    playground.generate()
    assert not playground.page.locator("#shading").is_visible()
    assert playground.page.locator("[class*=level-]:visible").count() == 0


def test_the_steered_answer_follows_a_strength_that_changes(open_page: Open) -> None:
    playground = open_page(AS_COMPLETION).ready()
    playground.set("german", 5)
    playground.page.wait_for_timeout(600)
    assert playground.sent == []  # nothing is asked before the first press of the button
    playground.generate()
    with playground.page.expect_response("**/v1/completions"):
        playground.set("german", -5)
    playground.wait()
    assert len(playground.sent) == 3
    assert playground.last_sent()["steer"] == {"german": -5}
    playground.page.get_by_label("Answer again when a strength changes").uncheck()
    playground.set("german", 2)
    playground.page.wait_for_timeout(600)
    assert len(playground.sent) == 3
    assert playground.page.get_by_text("The settings have changed since.").is_visible()


def test_a_preset_is_a_button_with_a_factor(open_page: Open) -> None:
    playground = open_page(AS_COMPLETION).ready()
    button = playground.page.get_by_role("button", name="polite-praise", exact=True)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    playground.set("polite-praise", 0.5)
    playground.generate()
    assert playground.last_sent()["steer"] == {"polite-praise": 0.5}
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert playground.number("polite-praise").input_value() == "0"


@pytest.mark.expects_errors
def test_an_error_is_shown_in_the_words_of_the_server(open_page: Open, server_url: str) -> None:
    steers = ["french", "german", "spanish", "sentiment", "formality"]
    fragment = f"{AS_COMPLETION}&steer={','.join(f'{name}:1' for name in steers)}"
    playground = open_page(fragment).ready()
    playground.generate()
    reply = httpx.post(f"{server_url}/v1/completions", json=playground.last_sent())
    assert reply.status_code == 400
    assert playground.problem() == reply.json()["error"]["message"]
    assert playground.page.get_by_role("alert").text_content() == playground.problem()
    assert playground.text("unsteered") != ""
    playground.page.get_by_role("button", name="All off").click()
    playground.generate()
    assert playground.problem() == ""


def test_reset_and_default_set_the_strength(open_page: Open) -> None:
    playground = open_page().ready()
    playground.page.get_by_role("button", name="french-vector: default 5").click()
    assert playground.slider("french-vector").input_value() == "5"
    playground.dynamic("french-vector").check()
    playground.page.get_by_role("button", name="Reset french-vector").click()
    assert playground.number("french-vector").input_value() == "0"
    assert not playground.dynamic("french-vector").is_checked()


def test_a_number_beyond_the_slider_moves_its_end(open_page: Open) -> None:
    playground = open_page().ready()
    playground.set("french", 25)
    slider = playground.slider("french")
    assert (slider.input_value(), slider.get_attribute("max")) == ("25", "25")
    playground.set("french", 0.37)
    assert playground.number("french").input_value() == "0.37"
