"""What the documents say in tables is what the code and the result files say."""

import json
import re
import sys
from pathlib import Path

import pytest

from vllm_steer.families import FAMILIES, UNSUPPORTED

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_every_family_has_its_row_in_the_guidance_document() -> None:
    text = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
    cells = r"^\| (\w+(?:CausalLM|LMHeadModel)) \| (.+) \| `(\w+)` \| `(\w+)` \| (pair|stream) \|$"
    rows = re.findall(cells, text, re.M)
    wanted = [
        (
            name,
            f"`{family.input_norm}`" if family.input_norm else "none: no site `attn_in`",
            family.attention,
            family.projection,
            "pair" if family.stream == "pair" else "stream",
        )
        for name, family in sorted(FAMILIES.items())
    ]
    assert rows == wanted
    assert not set(FAMILIES) & set(UNSUPPORTED)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_readmes_speed_table_is_made_from_the_result_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    sys.modules.pop("table", None)
    from table import markdown

    made = markdown(json.loads(path.read_text(encoding="utf-8")))
    assert made in (ROOT / "README.md").read_text(encoding="utf-8")
