"""``GET /steer``: when the page is served, what it may load, and the contrast of its colours."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from http_get import get

from vllm_steer import SteerConfig, SteerError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.http import playground
from vllm_steer.serving.http.playground import SCRIPTS, STYLES, page

FOLDER = Path(playground.__file__).parent


@pytest.fixture
def plan(make_plan: Any) -> SteerPlan:
    made: SteerPlan = make_plan({"a": 1.0}).model_copy(update={"playground": True})
    return made


class Document(HTMLParser):
    """The elements of a page, and the text inside style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("style", "script"):
            tag = self.elements[-1][0]
            self.inline[tag] = self.inline.get(tag, "") + data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script"):
            self.elements.append((f"/{tag}", {}))


@pytest.fixture(scope="module")
def document() -> Document:
    return Document(page().body.decode())


def test_the_page_is_off_unless_the_config_turns_it_on(make_plan: Any, plan: SteerPlan) -> None:
    assert get(make_plan({"a": 1.0}), "/steer").passed_on
    reply = get(plan, "/steer")
    assert (reply.status, reply.passed_on) == (200, False)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert int(reply.headers["content-length"]) == len(reply.body)
    assert reply.body.startswith(b"<!doctype html>")


def test_the_headers_of_the_page_can_be_asked_for_alone(plan: SteerPlan) -> None:
    assert get(plan, "/steer", method="HEAD").headers == get(plan, "/steer").headers


@pytest.mark.parametrize("path", ["/steer/", "/steering", "/v1/models", "/v1/steer"])
def test_other_paths_reach_the_application(plan: SteerPlan, path: str) -> None:
    assert get(plan, path).passed_on


def test_the_key_of_the_config_reaches_the_plan(make_plan: Any) -> None:
    entry = {"steers": {"a": {"path": "a.safetensors"}}}
    assert SteerConfig.load(entry).playground is False
    assert SteerConfig.load({**entry, "playground": True}).playground is True
    plan = make_plan({"a": 1.0}).model_copy(update={"playground": True})
    assert SteerPlan.from_json(plan.to_json()).playground is True


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_key_is_true_or_false(value: Any) -> None:
    with pytest.raises(SteerError, match="playground"):
        SteerConfig.load({"steers": {"a": {"path": "a.safetensors"}}, "playground": value})


def test_the_policy_allows_this_style_this_script_and_this_server_only(
    document: Document, plan: SteerPlan
) -> None:
    headers = get(plan, "/steer").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    for tag in ("style", "script"):
        digest = hashlib.sha256(document.inline[tag].encode()).digest()
        assert policy.pop(f"{tag}-src") == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"


def test_the_page_names_no_other_address(document: Document) -> None:
    text = page().body.decode()
    assert set(re.findall(r"https?://[^\s'\"]+", text)) == {"http://www.w3.org/2000/svg"}
    for tag, attributes in document.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert "src" not in attributes and "action" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:image/svg+xml,"))
    assert "url(" not in document.inline["style"] and "@import" not in document.inline["style"]


def test_every_file_of_the_folder_is_in_the_page() -> None:
    assert sorted(SCRIPTS) == sorted(path.name for path in FOLDER.glob("*.js"))
    assert sorted(STYLES) == sorted(path.name for path in FOLDER.glob("*.css"))
    for name in (*SCRIPTS, *STYLES):
        assert (FOLDER / name).read_text(encoding="utf-8").strip() in page().body.decode()


def test_every_element_that_the_script_asks_for_is_in_the_document(document: Document) -> None:
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    script = document.inline["script"]
    wanted = set(re.findall(r'byId\("([^"]+)"\)', script))
    assert len(wanted) > 30 and wanted <= set(ids)


def test_text_enters_the_document_as_text_only(document: Document) -> None:
    script = document.inline["script"]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in script
    for store in ("localStorage", "sessionStorage", "indexedDB", "document.cookie"):
        assert store not in script


LIGHT, DARK = "light", "dark"


def palette() -> dict[str, dict[str, str]]:
    """The colours by name, of both schemes."""
    text = (FOLDER / "palette.css").read_text(encoding="utf-8")
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    find = re.compile(r"--([a-z0-9-]+): (#[0-9a-f]{6});").findall
    return {LIGHT: dict(find(light)), DARK: dict(find(dark))}


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def test_the_contrast_formula_has_the_known_values() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


SHADES = [f"shade-{level}" for level in range(1, 6)]
TEXT_ON = [
    *(("text", ground) for ground in ("page", "surface", "code", *SHADES)),
    *(("muted", ground) for ground in ("page", "surface")),
    *(("accent", ground) for ground in ("page", "surface")),
    ("on-accent", "accent"),
    ("on-accent", "accent-strong"),
    ("problem", "problem-surface"),
]


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize(("text", "ground"), TEXT_ON, ids="-on-".join)
def test_text_has_the_contrast_of_level_aa(scheme: str, text: str, ground: str) -> None:
    colours = palette()[scheme]
    assert contrast(colours[text], colours[ground]) >= 4.5


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize("part", ["control", "accent", "problem"])
@pytest.mark.parametrize("ground", ["page", "surface"])
def test_borders_of_controls_and_the_focus_have_the_contrast_of_level_aa(
    scheme: str, part: str, ground: str
) -> None:
    colours = palette()[scheme]
    assert contrast(colours[part], colours[ground]) >= 3


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_the_shades_grow_step_by_step(scheme: str) -> None:
    colours = palette()[scheme]
    steps = [contrast(colours["surface"], colours[shade]) for shade in SHADES]
    assert steps == sorted(steps) and min(steps) > 1.05


def test_both_schemes_have_the_same_colours() -> None:
    assert palette()[LIGHT].keys() == palette()[DARK].keys()
