"""Hooks of the documentation site: pages that include files of the repository.

A page holds ``<!-- include: PATH -->`` with PATH from the repository's root. Links of the included
text are relative to that file; links to a file with its own page lead to that page.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r"<!-- include: (\S+) -->")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "extend.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""The pages of files outside ``docs``."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the source of each page."""
    return INCLUDE.sub(lambda include: included(include[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """MkDocs calls this with each page as HTML: ``::`` before a block of code is one colon."""
    return html.replace("::</p>", ":</p>")


def included(name: str) -> str:
    """A file as Markdown, with links relative to ``docs``; a program becomes a code block."""
    file = ROOT / name
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return f"```python\n{text}```"

    def link(match: re.Match[str]) -> str:
        target = (file.parent / match[1]).resolve().relative_to(ROOT).as_posix()
        page = PAGES.get(target, target.removeprefix("docs/"))
        return f"]({page}{match[2] or ''})"

    return LINK.sub(link, text)
