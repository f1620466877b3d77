"""Steers in quantised models, against Hugging Face with the dequantised weights in float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from engines import GUIDED, engine, greedy, guidance_steers, prompts, steer_config
from quantised_models import FORMATS, save_quantised
from reference import assert_as_near_as_unsteered, load_reference
from tiny_models import GUIDED_LAYERS, HIDDEN

pytestmark = [pytest.mark.engine, pytest.mark.matrix]
SETTINGS = tuple(s for s in GUIDED if not {"plain", "bias", "tilt"} & set(s))


@pytest.mark.parametrize("name", FORMATS)
def test_a_steered_quantised_model_is_as_near_to_its_weights_as_an_unsteered_one(
    name: str, tmp_path: Path
) -> None:
    """A quantised model differs from its weights by what it does to its activations."""
    quantised = FORMATS[name]
    model, plain = save_quantised(quantised, tmp_path)
    reference = load_reference(plain)
    steers = guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)
    unsteered: tuple[Mapping[str, Any], ...] = ({},) * 24
    with engine(model, steer_config(steers, tmp_path / "steers"), dtype=quantised.dtype) as llm:
        outputs = llm.generate(
            prompts(len(SETTINGS) + len(unsteered)),
            greedy([*SETTINGS, *unsteered], max_tokens=12),
            use_tqdm=False,
        )
    assert_as_near_as_unsteered(outputs, reference, [*SETTINGS, *unsteered], steers)
