"""The examples of the documents are configs, requests and programs that work; links are right."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_steer.config import SteerConfig
from vllm_steer.request.parsing import parse

ROOT = Path(__file__).parents[3]
PAGES = sorted({*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"})
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
RELATIVE_LINK = re.compile(r"\]\((?![a-z]+:|#)")


def examples(language: str) -> list[Any]:
    return [
        pytest.param(body, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (name, body) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if name == language
    ]


@pytest.mark.parametrize("text", [e for e in examples("yaml") if "steers:" in e.values[0]])
def test_an_example_of_a_config_is_a_config(text: str) -> None:
    config = SteerConfig.model_validate(yaml.safe_load(text))
    assert config.steers


@pytest.mark.parametrize("text", examples("json"))
def test_an_example_of_a_request_is_a_request(text: str) -> None:
    body = json.loads(text)
    assert dict(parse(body["steer"]))


@pytest.mark.parametrize("text", examples("python"))
def test_an_example_in_python_is_python(text: str) -> None:
    assert ast.parse(text).body


@pytest.mark.parametrize("page", ["serve", "ask", "dynamic", "guidance", "recipes", "README"])
def test_the_pages_that_have_examples_are_read(page: str) -> None:
    ids = [e.id for kind in ("yaml", "json", "python") for e in examples(kind)]
    assert any(str(name).startswith(f"{page}-") for name in ids)


def test_the_readme_has_no_link_that_breaks_on_the_package_index() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not RELATIVE_LINK.search(text)
    for name in re.findall(r"`((?:docs/)?[\w-]+\.md)`", text):
        assert (ROOT / name).is_file(), name


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}" in text


def ratios(name: str, figure: str) -> list[float]:
    result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return [row["ratio_median"] for row in result["rows"] if row["name"] == figure]


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    steered = ratios("cpu-gpt2-medium.json", "steered")
    guided = ratios("cpu-gpt2-medium-guidance.json", "guided")
    assert f"takes {min(steered):.2f} to {max(steered):.2f} times as long" in text
    assert f"and {min(guided):.2f} to {max(guided):.2f} times with a vector" in text
