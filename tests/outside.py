"""Optional files that tests use and that are not in the repository.

Set ``VLLM_STEER_TEST_FILES`` to a folder that has them. The end of a run lists the number of tests
skipped for each missing file.
"""

import os
from pathlib import Path

import pytest

REASON = "needs a file that is not in the repository: "
FOLDER = Path(os.environ.get("VLLM_STEER_TEST_FILES", Path(__file__).parents[2] / "shared"))
STORIES = FOLDER / "models" / "stories260K"
"""A pretrained Llama of 260 thousand parameters."""
AUTHORS_PROMPTS = FOLDER / "data" / "prompts" / "negative_prompts.jsonl"
"""The prompts of LM-Steer's authors."""
CONCEPT_VECTORS = FOLDER / "data" / "concept_vectors"
"""The published vectors of concept guidance."""
SST5 = FOLDER / "data" / "sst5" / "train.txt"
"""The training sentences of SST-5 with labels 1 to 5, in fastText's form."""
HOSTILE_SAMPLES = FOLDER / "cases" / "files"


def needs(path: Path) -> pytest.MarkDecorator:
    """Skip a test if a file is missing, with the name of the file."""
    name = path.relative_to(FOLDER)
    return pytest.mark.skipif(not path.exists(), reason=f"{REASON}{name}")
