"""Models around a language model, as vLLM serves them: text and image prompts equal Hugging Face.

vLLM serves them on a CPU only where torchvision can be imported, in a process of its own.
"""

import pytest
from engines import GUIDED
from scenarios import run_scenario
from vision import IMAGE_MARKS, vision_environment
from wrapped_models import WRAPPED
from wrapped_scenarios import IMAGE_SETTINGS

pytestmark = pytest.mark.engine


@pytest.mark.matrix
def test_every_kind_site_mode_schedule_and_phase_on_text() -> None:
    report = run_scenario("wrapped-models", *WRAPPED, **vision_environment())
    for name in WRAPPED:
        assert f"{name}: {len(GUIDED)} outputs equal the reference" in report


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.startswith("Mistral3") else [pytest.mark.matrix])
        for name in IMAGE_MARKS
    ],
)
def test_image_prompts_and_their_cached_blocks(name: str) -> None:
    report = run_scenario("image-prompts", name, **vision_environment())
    assert f"{name}: {3 * len(IMAGE_SETTINGS)} outputs equal the reference" in report
