"""Models that are not in the table: the self-test finds their sites, Hugging Face agrees."""

from pathlib import Path

import pytest
from engines import (
    GUIDED,
    doses_of,
    engine,
    greedy,
    guidance_steers,
    prompts,
    random_steers,
    settings_without,
    steer_config,
)
from reference import assert_guided, load_reference
from self_tested_models import UNTESTED, save_untested
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB

pytestmark = pytest.mark.engine

QUICK = ("Glm4ForCausalLM", "GraniteForCausalLM")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.matrix]) for n in UNTESTED],
)
def test_every_kind_site_mode_schedule_and_phase(name: str, tmp_path: Path) -> None:
    guidance = guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)
    steers = {**random_steers(HIDDEN, VOCAB), **guidance}
    settings = GUIDED
    for site in UNTESTED[name].lacks:
        settings = settings_without(site, settings, steers)
        steers = {key: steer for key, steer in steers.items() if steer.site != site}
    model = save_untested(name, tmp_path / "model")
    reference = load_reference(model)
    with engine(model, steer_config(steers, tmp_path / "steers")) as llm:
        outputs = llm.generate(
            prompts(len(settings)),
            greedy(settings, max_tokens=12, prompt_logprobs=1),
            use_tqdm=False,
        )
    for output, setting in zip(outputs, settings, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > len(settings) // 2
