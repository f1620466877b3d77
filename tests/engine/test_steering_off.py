"""Mutations: steering that is off in one layer, for whatever reason, stops the start."""

from pathlib import Path
from typing import Any

import pytest
from engines import engine, guidance_steers, steer_config
from tiny_models import GUIDED_LAYERS, HIDDEN, save_tiny_model

from vllm_steer import SteerError
from vllm_steer.serving.site import SteeredSite

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

STEERS = guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)


def leave_out(site: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn steering off at one site of one layer."""
    steer_ = SteeredSite.steer_

    def mutated(self: SteeredSite, hidden: Any, residual: Any, index: int) -> None:
        if (self.table.site, self.table.layers[index]) != (site, layer):
            steer_(self, hidden, residual, index)

    monkeypatch.setattr(SteeredSite, "steer_", mutated)


# A llama's layers return a pair; a gpt2's the stream, which an addition enters by its last term.
@pytest.mark.parametrize(
    ("family", "steer", "layer"),
    [
        *(("llama", "push", layer) for layer in range(GUIDED_LAYERS)),
        *(("gpt2", "push", layer) for layer in range(GUIDED_LAYERS)),
        *(("llama", "spin", 2), ("gpt2", "spin", 1)),
        *(("llama", "turn", 1), ("llama", "nudge", 2), ("llama", "steps", 0)),
    ],
)
def test_steering_that_is_off_in_one_layer_stops_the_start(
    family: str, steer: str, layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = STEERS[steer].site
    model = save_tiny_model(family, tmp_path / "model", num_layers=GUIDED_LAYERS)
    leave_out(site, layer, monkeypatch)
    with (
        pytest.raises(SteerError, match=f"steer {steer}: at {site} of layer {layer} "),
        engine(model, steer_config({steer: STEERS[steer]}, tmp_path / "steers")),
    ):
        pass
