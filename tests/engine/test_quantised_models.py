"""Steers in quantised models, against Hugging Face with the dequantised weights in float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import GUIDED, doses_of, engine, greedy, guidance_steers, prompts, steer_config
from quantised_models import FORMATS, save_quantised
from reference import guided_logprobs, load_reference
from tiny_models import GUIDED_LAYERS, HIDDEN

from vllm_steer import Steer

pytestmark = [pytest.mark.engine, pytest.mark.matrix]
SETTINGS = tuple(s for s in GUIDED if not {"plain", "bias", "tilt"} & set(s))


def difference(
    output: Any, reference: Any, setting: Mapping[str, Any], steers: Mapping[str, Steer]
) -> float:
    """The largest difference of a generated token's log-probability from the reference's."""
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    ids = [*prompt, *completion.token_ids]
    expected = guided_logprobs(reference, ids, len(prompt), doses_of(setting, steers), steers)
    tokens = torch.tensor(completion.token_ids)
    actual = [completion.logprobs[i][token].logprob for i, token in enumerate(tokens.tolist())]
    rows = expected[len(prompt) - 1 : -1].gather(1, tokens[:, None])[:, 0]
    return float((rows - torch.tensor(actual)).abs().max())


@pytest.mark.parametrize("name", FORMATS)
def test_a_steered_quantised_model_is_as_near_to_its_weights_as_an_unsteered_one(
    name: str, tmp_path: Path
) -> None:
    """A quantised model differs from its weights by what it does to its activations."""
    quantised = FORMATS[name]
    model, plain = save_quantised(quantised, tmp_path)
    reference = load_reference(plain)
    steers = guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)
    unsteered: tuple[Mapping[str, Any], ...] = ({},) * 8
    with engine(model, steer_config(steers, tmp_path / "steers"), dtype=quantised.dtype) as llm:
        outputs = llm.generate(
            prompts(len(SETTINGS) + len(unsteered)),
            greedy([*SETTINGS, *unsteered], max_tokens=12),
            use_tqdm=False,
        )
    own = max(
        difference(output, reference, {}, steers)
        for output, setting in zip(outputs, (*SETTINGS, *unsteered), strict=True)
        if not setting
    )
    for output, setting in zip(outputs, SETTINGS, strict=False):
        steered = difference(output, reference, setting, steers)
        assert steered <= 2 * own, (setting, steered, own)
        if any(doses_of(setting, steers)) and all(d.strength for d in doses_of(setting, steers)):
            assert difference(output, reference, {}, steers) > 2 * own, setting
