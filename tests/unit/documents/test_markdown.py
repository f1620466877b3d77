"""Untrusted text in Markdown is rendered literally."""

import pytest
from hostile_texts import HOSTILE
from markdown_it import MarkdownIt

from vllm_steer.markdown import markdown_row, markdown_text
from vllm_steer.untrusted_text import printable

MARKS = {
    "table": "a | b || c",
    "image": "![x](http://example.org/x.png)",
    "link": "[x](javascript:alert(1)) <http://example.org> http://example.org www.example.org",
    "html": "<script>alert(1)</script> &lt; <!-- x -->",
    "code": "`a` ``b`` ~~c~~ **d** __e__ *f* _g_",
    "heading": "# a ##",
    "bullet": "- a",
    "plus": "+ a",
    "number": "12. a",
    "quote": "> a",
    "rule": "---",
    "stars": "***",
    "fence": "```",
    "task": "[ ] a",
    "reference": "[a]: http://example.org",
    "backslash": "\\* \\",
    "spaces": "    a",
    "formula": "$x$ $$y$$",
}
TEXTS = {**{f"hostile-{k}": v for k, v in HOSTILE.items() if k != "long"}, **MARKS}
every = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])


def texts(source: str, kind: str) -> tuple[list[str], set[str]]:
    """The text of each inline token, and the types of all tokens."""
    tokens = parser().parse(source)
    inline = [token for token in tokens if token.type == "inline"]
    inner = {child.type for token in inline for child in token.children or ()}
    result = ["".join(child.content for child in t.children or ()) for t in inline]
    return result, inner | {token.type for token in tokens}


@every
def test_a_heading_and_an_item_are_the_text(text: str) -> None:
    expected = printable(text, 1000).strip()
    for source, kinds in (
        (f"# {markdown_text(text)}\n", {"heading_open", "heading_close"}),
        (
            f"- {markdown_text(text)}\n",
            {
                *("bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"),
                *("paragraph_open", "paragraph_close"),
            },
        ),
    ):
        result, types = texts(source, "inline")
        assert result == [expected]
        assert types <= {*kinds, "inline", "text", "text_special"}


@every
def test_a_cell_is_the_text(text: str) -> None:
    expected = printable(text, 1000).strip()
    source = "\n".join([markdown_row([text, "1"]), "| --- | --- |", markdown_row(["0.5", text])])
    result, types = texts(source, "inline")
    assert result == [expected, "1", "0.5", expected]
    assert not types & {
        "link_open",
        "image",
        "code_inline",
        "html_inline",
        "em_open",
        "strong_open",
    }


def test_figures_stay_as_they_are() -> None:
    assert markdown_row(["-2", "0.500", "1.23e+04"]) == "| -2 | 0.500 | 1.23e+04 |"
    assert markdown_text("lexicon:mine, random: PNES") == "lexicon:mine, random: PNES"
