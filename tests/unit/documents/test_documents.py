"""Tables in the documents agree with the code and the result files."""

import re
from pathlib import Path

import pytest

from benchmarks import documents
from vllm_steer.families import FAMILIES, SELF_TESTED, UNSUPPORTED, Family

ROOT = Path(__file__).parents[3]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def _names(name: str, family: Family) -> tuple[str, str, str, str]:
    norm = f"`{family.input_norm}`" if family.input_norm else "none: no site `attn_in`"
    return name, norm, family.attention, family.projection


def test_every_family_has_its_row_in_the_guidance_document() -> None:
    text = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
    names = "CausalLM|LMHeadModel|ConditionalGeneration"
    cells = rf"^\| (\w+(?:{names})) \| (.+) \| `(\w+)` \| `(\w+)` \| ([a-z-]+) \|$"
    rows = re.findall(cells, text, re.M)
    expected = [
        (*_names(name, family), "pair" if family.stream == "pair" else "stream")
        for name, family in sorted(FAMILIES.items())
    ]
    expected += [
        (*_names(name, family), "self-test") for name, family in sorted(SELF_TESTED.items())
    ]
    assert rows == expected
    assert not set(FAMILIES) & set(UNSUPPORTED)


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda path: path.stem)
def test_every_table_of_figures_is_made_from_its_result_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert documents.BLOCK.search(text)
    assert documents.filled(text) == text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_file_has_its_table_in_a_document(path: Path) -> None:
    texts = [document.read_text(encoding="utf-8") for document in documents.DOCUMENTS]
    tables = [name for text in texts for _, _, name, _ in documents.BLOCK.findall(text)]
    assert path.name in tables
