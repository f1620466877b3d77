"""Models around a language model, as vLLM serves them: text and image prompts equal Hugging Face.

vLLM serves them on a CPU only where torchvision can be imported, in a process of its own.
"""

import pytest
from engines import GUIDED, vllm_version
from packaging.version import Version
from scenarios import run_scenario
from vision import IMAGE_MARKS, vision_environment
from wrapped_models import WRAPPED
from wrapped_scenarios import IMAGE_SETTINGS

pytestmark = pytest.mark.engine


is_old = vllm_version < Version("0.28")

# Beside the Transformers that pip takes for vLLM 0.25.1, vLLM cannot import the first of these, and
# the forward pass of the second fails in Transformers itself.
NOT_ON_OLD = {"Mistral3ForConditionalGeneration", "Llama4ForConditionalGeneration"}


@pytest.mark.matrix
def test_every_kind_site_mode_schedule_and_phase_on_text() -> None:
    names = [name for name in WRAPPED if not (is_old and name in NOT_ON_OLD)]
    report = run_scenario("wrapped-models", *names, **vision_environment())
    for name in names:
        assert f"{name}: {len(GUIDED)} outputs equal the reference" in report


@pytest.mark.skipif(
    is_old,
    reason=f"vLLM {vllm_version.base_version} cannot use this Transformers' processors of images",
)
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
