"""The page by keyboard, for a screen reader, on a phone, in light and dark.

``VLLM_STEER_SCREENSHOTS=1`` writes the pictures of the documentation to ``docs/images``.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_tools import Playground
from playwright.sync_api import expect

from vllm_steer.embedded import lexicon

pytestmark = pytest.mark.matrix
Open = Callable[..., Playground]
REPO = Path(__file__).parents[2]
AUDIT = (Path(__file__).parent / "audit.js").read_text(encoding="utf-8")
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 860}
PICTURED = {"width": 1280, "height": 1160}  # down to the steers that are on
FRENCH = "#prompt=Hotel+Astoria:&api=completion&max_tokens=40&steer=french:5"
MIXED = (
    "#prompt=Hotel+Astoria:&api=completion&max_tokens=40"
    "&steer=french-delta:dynamic:2,sentiment:dynamic:5"
)
NAMED = {
    *("button", "checkbox", "combobox", "link", "radio", "slider", "spinbutton", "tab"),
    *("textbox", "DisclosureTriangle", "listbox", "table", "tabpanel", "region", "form"),
}
each_scheme = pytest.mark.parametrize("scheme", ["light", "dark"])
each_size = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])


@each_scheme
@each_size
def test_the_audit_finds_nothing(open_page: Open, scheme: Any, size: dict[str, int]) -> None:
    playground = open_page(MIXED, viewport=size, color_scheme=scheme).ready()
    assert playground.page.evaluate(AUDIT) == []
    playground.generate()
    for summary in playground.page.locator("summary").all():
        summary.click()
    assert playground.page.evaluate(AUDIT) == []


def test_every_control_has_a_name_and_no_two_the_same(open_page: Open) -> None:
    playground = open_page(MIXED).ready()
    playground.generate()
    session = playground.page.context.new_cdp_session(playground.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in NAMED
    ]
    assert [role for role, name in named if not name.strip()] == []
    assert len(named) > 70
    assert [pair for pair in set(named) if named.count(pair) > 1] == []


def focused(playground: Playground) -> str:
    """What the focused element shows of itself, and whether its outline is visible."""
    name: str = playground.page.evaluate(
        """() => {
          const node = document.activeElement;
          const { outlineStyle, outlineWidth } = getComputedStyle(node);
          if (outlineStyle === 'none' || parseFloat(outlineWidth) < 2) return 'no focus';
          return node.id || node.getAttribute('aria-label') || node.textContent;
        }"""
    )
    return name


def test_the_focus_goes_from_the_prompt_to_the_steers_and_on_to_the_answers(
    open_page: Open,
) -> None:
    playground = open_page().ready()
    seen: list[str] = []
    for _ in range(90):
        playground.page.keyboard.press("Tab")
        seen.append(focused(playground))
        if seen[-1] == "code":
            break
    assert "no focus" not in seen
    assert seen[:2] == ["skip", "model"]
    stops = ["prompt", "chat", "max-tokens", "temperature", "seed", "generate", "all-off"]
    later = ["follow", "steer-0", "Steered", "copy-link", "tab-curl", "copy", "code"]
    places = [seen.index(name) for name in (*stops, *later)]
    assert places == sorted(places)


def test_the_page_works_by_keyboard_alone(open_page: Open) -> None:
    playground = open_page("#api=completion&max_tokens=40").ready()
    keyboard = playground.page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(90):
            if focused(playground) == name:
                return
            keyboard.press("Tab")
        pytest.fail(f"{name} was not reached")

    keyboard.press("Tab")
    tab_to("prompt")
    keyboard.press("Control+a")
    keyboard.type("Hotel Astoria:")
    slider = playground.slider("french")
    keyboard.press("Tab")
    tab_to(str(slider.get_attribute("id")))
    keyboard.press("ArrowRight")
    assert 0 < float(slider.input_value()) < 1
    keyboard.press("PageUp")
    keyboard.press("PageUp")
    keyboard.press("PageUp")
    assert float(slider.input_value()) > 4
    assert slider.get_attribute("aria-valuetext") == slider.input_value()
    keyboard.press("Control+Enter")
    playground.wait()
    assert lexicon.language(playground.text("steered")) == "fr"
    assert lexicon.language(playground.text("unsteered")) == "en"
    tab_to("tab-curl")
    keyboard.press("ArrowRight")
    assert focused(playground) == "tab-python"
    expect(playground.page.locator("#code")).to_contain_text("from openai import OpenAI")
    keyboard.press("ArrowLeft")
    keyboard.press("ArrowLeft")
    assert focused(playground) == "tab-json"


def test_the_skip_link_leads_to_the_answers(open_page: Open) -> None:
    playground = open_page(FRENCH).ready()
    before = playground.page.url
    playground.page.keyboard.press("Tab")
    playground.page.keyboard.press("Enter")
    assert playground.page.evaluate("document.activeElement.id") == "answers"
    assert playground.page.url == before


SPOKEN = """
() => {
  window.spoken = [];
  const region = document.querySelector('[aria-live=polite]');
  new MutationObserver(() => window.spoken.push(region.textContent)).observe(
    region, { childList: true, characterData: true, subtree: true });
}
"""


def test_a_screen_reader_hears_the_steered_answer_in_few_parts(open_page: Open) -> None:
    playground = open_page(FRENCH).ready()
    playground.page.evaluate(SPOKEN)
    playground.generate()
    spoken = playground.page.evaluate("window.spoken")
    tokens = playground.page.locator("#steered .token").count()
    assert len(spoken) < 6 < tokens
    assert playground.text("steered") in " ".join(spoken)
    assert spoken[-1].endswith("Stopped at max tokens")
    live = playground.page.locator("#steered .text").evaluate("node => node.closest('[aria-live]')")
    assert live is None


WIDEN = """
() => {
  document.querySelector('#strength-table th[scope=row]').textContent = 'x'.repeat(300);
  document.querySelector('#steered .steer-header').textContent = 'y'.repeat(300);
}
"""


@pytest.mark.parametrize("width", [320, 360])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page: Open, width: int) -> None:
    playground = open_page(MIXED, viewport={"width": width, "height": 640}).ready()
    playground.page.locator("#prompt").fill("unbroken" * 60)
    playground.generate()
    for summary in playground.page.locator("summary").all():
        summary.click()
    playground.page.evaluate(WIDEN)
    for tab in ("curl", "Python", "JSON"):
        playground.page.get_by_role("tab", name=tab).click()
        assert playground.page.evaluate("document.documentElement.scrollWidth") == width
    expect(playground.page.get_by_role("button", name="Generate")).to_be_in_viewport()


def test_on_a_phone_the_answers_come_into_view(open_page: Open) -> None:
    playground = open_page(FRENCH, viewport=PHONE, reduced_motion="reduce").ready()
    playground.generate()
    expect(playground.page.locator("#unsteered .text")).to_be_in_viewport()


def test_nothing_moves_for_those_who_ask_for_that(open_page: Open) -> None:
    def animation(**options: Any) -> str:
        playground = open_page(**options).ready()
        name: str = playground.page.evaluate(
            """() => {
              document.querySelector('#steered').classList.add('busy');
              const text = document.querySelector('#steered .text');
              return getComputedStyle(text, '::after').animationName;
            }"""
        )
        return name

    assert animation(reduced_motion="no-preference") == "caret"
    assert animation(reduced_motion="reduce") == "none"


@each_scheme
@pytest.mark.parametrize(("name", "size"), [("desktop", PICTURED), ("phone", PHONE)])
def test_a_picture_is_taken(
    open_page: Open, scheme: Any, name: str, size: dict[str, int], tmp_path: Path
) -> None:
    fragment = FRENCH if scheme == "light" else MIXED
    playground = open_page(
        fragment, viewport=size, color_scheme=scheme, reduced_motion="reduce"
    ).ready()
    playground.generate()
    playground.page.mouse.move(0, 0)
    folder = REPO / "docs" / "images" if os.environ.get("VLLM_STEER_SCREENSHOTS") else tmp_path
    path = folder / f"playground-{name}-{scheme}.png"
    playground.page.screenshot(path=path)
    assert path.stat().st_size > 10_000
