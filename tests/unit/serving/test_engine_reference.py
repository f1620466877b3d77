"""The reference of the engine tests, compared with a few cases calculated by hand.

``P`` is the prompt's length: row ``P - 1`` of the log-probabilities chooses the first token.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "engine"))
from engines import (
    GUIDED,
    READING,
    conditions,
    doses_of,
    guidance_steers,
    random_steers,
    reading_steers,
    settings_without,
)
from reference import Change, guide, guided_logprobs, load_reference, steered_logprobs
from tiny_models import (
    GUIDED_FAMILIES,
    GUIDED_LAYERS,
    HIDDEN,
    VOCAB,
    heads_width,
    save_tiny_model,
)

from vllm_steer import DeltaSteer, LMSteer, VectorSteer
from vllm_steer.doses import Dose, TokenWindows
from vllm_steer.steers import KINDS, ConditionSteer
from vllm_steer.steers.condition import SIDES, SIMILARITIES, TOKENS
from vllm_steer.steers.sae import SAE_MODES
from vllm_steer.steers.schedules import SCHEDULES
from vllm_steer.steers.sites import DELTA_SITES, VECTOR_SITES
from vllm_steer.steers.vector import MODES

P = 4
IDS = [7, 300, 41, 7, 96, 12, 255, 130, 3, 99]
LAST = GUIDED_LAYERS - 1
STEERS = {
    **random_steers(HIDDEN, VOCAB),
    **guidance_steers(HIDDEN, GUIDED_LAYERS, heads_width("llama")),
}


def load_family(family: str, folder: Path) -> Any:
    return load_reference(save_tiny_model(family, folder, num_layers=GUIDED_LAYERS))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(llama: Any) -> torch.Tensor:
    return steered_logprobs(llama, IDS, {}, {})


def logprobs(model: Any, *doses: Dose, **steers: Any) -> torch.Tensor:
    return guided_logprobs(model, IDS, P, doses, {**STEERS, **steers})


def entering(model: Any, module: str, *doses: Dose) -> torch.Tensor:
    """What enters a module, per position."""
    inputs: list[torch.Tensor] = []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    hook = model.get_submodule(module).register_forward_pre_hook(record, with_kwargs=True)
    logprobs(model, *doses)
    hook.remove()
    return inputs[0][0]


def after_last_layer(model: Any, added: torch.Tensor) -> torch.Tensor:
    """Log-probabilities with something added before the final norm."""
    with torch.no_grad():
        hidden = model.model.norm(entering(model, "model.norm") + added)
        return torch.log_softmax(model.lm_head(hidden), dim=-1)


def changed_rows(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    return [row for row in range(len(a)) if not torch.equal(a[row], b[row])]


def last_layer_delta(steps: int) -> DeltaSteer:
    delta = torch.randn(steps, 1, HIDDEN, generator=torch.Generator().manual_seed(1))
    return DeltaSteer(delta=delta, layers=(LAST,), site="resid")


def test_doses_of_strength_zero_change_no_bit(llama: Any, plain: torch.Tensor) -> None:
    doses = [Dose(name, 0.0) for name in STEERS]
    assert torch.equal(logprobs(llama, *doses), plain)


def test_a_rotating_dose_of_strength_zero_does_not_rescale_other_additions(llama: Any) -> None:
    push = Dose("push", 1.0)
    assert torch.equal(logprobs(llama, push, Dose("spin", 0.0)), logprobs(llama, push))


def test_adding_at_the_last_block_is_adding_before_the_final_norm(llama: Any) -> None:
    added = -1.5 * STEERS["push"].vectors[LAST].double()
    result = logprobs(llama, Dose("push", -1.5, layers=(LAST,)))
    torch.testing.assert_close(result, after_last_layer(llama, added))


@pytest.mark.parametrize("strength", [6.0, -6.0])
@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [("turn", 0, "model.layers.0.self_attn.q_proj"), ("spin", 1, "model.layers.2")],
)
def test_rotating_is_adding_the_direction_at_the_old_norm(
    llama: Any, name: str, layer: int, module: str, strength: float
) -> None:
    steer = STEERS[name]
    w = steer.vectors[steer.layers.index(layer)].double()
    before = entering(llama, module)
    after = entering(llama, module, Dose(name, strength, layers=(layer,)))
    moved = before + strength * w / w.norm()
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    torch.testing.assert_close(
        after / after.norm(dim=-1, keepdim=True), moved / moved.norm(dim=-1, keepdim=True)
    )


def test_changes_of_one_site_are_summed_and_rescaled_once_where_one_rotates() -> None:
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    adds = Change(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([False, False]))
    rotates = Change(torch.tensor([[5.0, 8.0], [0.0, 0.0]]), torch.tensor([True, False]))
    # (9, 12) is 15 long and (3, 4) is 5.
    assert torch.equal(guide(x, [adds, rotates]), torch.tensor([[3.0, 4.0], [4.0, 4.0]]))


def test_the_change_at_the_input_norm_leaves_the_residual_stream(llama: Any) -> None:
    block = llama.model.layers[0]
    outputs: list[torch.Tensor] = []
    hook = block.self_attn.register_forward_hook(lambda _, args, out: outputs.append(out[0][0]))
    sums = entering(llama, "model.layers.0.post_attention_layernorm", Dose("lean", 2.0))
    hook.remove()
    torch.testing.assert_close(sums - outputs[0], entering(llama, "model.layers.0"))


def test_the_change_at_the_attention_output_is_added_to_the_residual_stream(llama: Any) -> None:
    module = "model.layers.0.post_attention_layernorm"
    moved = entering(llama, module, Dose("nudge", 2.0)) - entering(llama, module)
    expected = 2.0 * STEERS["nudge"].vectors[0].double()
    torch.testing.assert_close(moved, expected.expand_as(moved))


@pytest.mark.parametrize("family", ["llama", "qwen3-heads-wider-than-hidden"])
def test_a_delta_at_the_heads_is_its_projection_at_the_attention_output(
    family: str, tmp_path: Path
) -> None:
    model = load_family(family, tmp_path)
    heads = guidance_steers(HIDDEN, GUIDED_LAYERS, heads_width(family))["steps"]
    projected = torch.stack(
        [
            heads.delta[:, layer].double() @ block.self_attn.o_proj.weight.data.T
            for layer, block in enumerate(model.model.layers)
        ],
        dim=1,
    )
    moved = DeltaSteer(delta=projected, layers=heads.layers, site="attn_out")
    dose = Dose("steps", 3.0)
    torch.testing.assert_close(
        logprobs(model, dose, steps=heads), logprobs(model, dose, steps=moved)
    )


@pytest.mark.parametrize(
    ("schedule", "coefficients"),
    [
        (None, [2.0, 2.0, 2.0, 2.0]),
        ("fixed", [2.0, 2.0, 2.0, 2.0]),
        ("start", [2.0, 0.0, 0.0, 0.0]),
        ("dim", [2.0, 1.5, 1.0, 0.5]),
    ],
)
def test_delta_steps_begin_at_the_last_prompt_token_and_follow_the_schedule(
    llama: Any, plain: torch.Tensor, schedule: Any, coefficients: list[float]
) -> None:
    steer = last_layer_delta(len(coefficients))
    added = torch.zeros(len(IDS), HIDDEN, dtype=torch.float64)
    for step, coefficient in enumerate(coefficients):
        added[P - 1 + step] = coefficient * steer.delta[step, 0].double()
    result = logprobs(llama, Dose("walk", 2.0, schedule=schedule), walk=steer)
    torch.testing.assert_close(result, after_last_layer(llama, added))
    last = P - 1 + sum(c != 0 for c in coefficients)
    assert changed_rows(result, plain) == list(range(P - 1, last))


@pytest.mark.parametrize("name", ["steps", "walk"])
def test_a_delta_does_not_change_rows_before_the_last_prompt_token(
    llama: Any, plain: torch.Tensor, name: str
) -> None:
    result = logprobs(llama, Dose(name, 3.0))
    assert changed_rows(result, plain) == list(range(P - 1, len(IDS)))


@pytest.mark.parametrize("name", sorted(guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)))
def test_phase_generation_does_not_change_the_rows_of_the_prompt(
    llama: Any, plain: torch.Tensor, name: str
) -> None:
    result = logprobs(llama, Dose(name, 4.0, phase="generation"))
    assert changed_rows(result, plain) == list(range(P, len(IDS)))


@pytest.mark.parametrize(("phase", "rows"), [("all", (0, 10)), ("prompt", (0, P))])
def test_a_phase_is_of_the_tokens_that_a_dose_acts_on(
    llama: Any, plain: torch.Tensor, phase: Any, rows: tuple[int, int]
) -> None:
    result = logprobs(llama, Dose("push", 1.0, layers=(LAST,), phase=phase))
    assert changed_rows(result, plain) == list(range(*rows))


def test_phase_prompt_of_a_delta_is_its_first_step(llama: Any) -> None:
    prompt, start = Dose("walk", 3.0, phase="prompt"), Dose("walk", 3.0, schedule="start")
    assert torch.equal(logprobs(llama, prompt), logprobs(llama, start))


@pytest.mark.parametrize("name", ["push", "turn", "steps"])
def test_a_dose_with_layers_equals_a_steer_of_only_these_layers(llama: Any, name: str) -> None:
    reduced = STEERS[name].keep_layers((0, 2))
    result = logprobs(llama, Dose(name, 3.0, layers=(0, 2)))
    assert torch.equal(result, logprobs(llama, Dose(name, 3.0), **{name: reduced}))


def test_doses_at_the_head_are_summed_by_name_and_steered_as_before(llama: Any) -> None:
    doses = Dose("dummy", 1.0), Dose("dummy", 2.0), Dose("tilt", -1.0), Dose("tilt", 1.0)
    assert torch.equal(logprobs(llama, *doses), steered_logprobs(llama, IDS, {"dummy": 3}, STEERS))


def test_no_hook_stays_on_the_model(llama: Any, plain: torch.Tensor) -> None:
    logprobs(llama, *(Dose(name, 2.0) for name in STEERS))
    assert torch.equal(steered_logprobs(llama, IDS, {}, {}), plain)


@pytest.mark.parametrize("family", GUIDED_FAMILIES)
def test_every_site_of_each_family_is_reached(family: str, tmp_path: Path) -> None:
    model = load_family(family, tmp_path)
    steers = guidance_steers(HIDDEN, GUIDED_LAYERS, heads_width(family))
    plain = steered_logprobs(model, IDS, {}, {})
    for name, steer in steers.items():
        if steer.site == "attn_in" and family == "olmo2-no-input-norm":
            with pytest.raises(AssertionError, match="has no attn_in"):
                logprobs(model, Dose(name, 3.0), **steers)
            continue
        for layer in steer.layers:
            result = logprobs(model, Dose(name, 3.0, layers=(layer,)), **steers)
            assert (result - plain).abs().max() > 1e-2


def test_settings_are_read_as_doses() -> None:
    setting = {"push": -2, "steps": {"strength": 1.5, "layers": "0-1"}, "plain": 3.0}
    assert doses_of(setting, STEERS) == [
        Dose("push", -2),
        Dose("steps", 1.5, layers=(0, 1), schedule="fixed"),
        Dose("plain", 3.0),
    ]
    options = {"strength": 4, "layers": "0,2", "phase": "prompt"}
    assert doses_of({"turn": options}, STEERS) == [Dose("turn", 4, (0, 2), "prompt")]
    options = {"strength": 4, "layers": [1], "schedule": "start"}
    assert doses_of({"walk": options}, STEERS) == [Dose("walk", 4, (1,), schedule="start")]


def used(steers: Sequence[str], attribute: str) -> set[Any]:
    return {getattr(STEERS[name], attribute, None) for name in steers} - {None}


def test_the_guided_settings_cover_every_kind_site_mode_phase_and_schedule() -> None:
    doses = [dose for setting in GUIDED for dose in doses_of(setting, STEERS)]
    names = [dose.steer for dose in doses]
    assert {type(STEERS[name]) for name in names} == {LMSteer, VectorSteer, DeltaSteer}
    assert used(names, "site") == {"head", *VECTOR_SITES, *DELTA_SITES}
    assert used(names, "mode") == {"add", "rotate"}
    assert {dose.phase for dose in doses} == {"all", "prompt", "generation", "text"}
    assert {dose.schedule for dose in doses} == {None, *SCHEDULES}


def test_the_settings_of_readings_cover_what_reads_a_token_windows_and_gates() -> None:
    steers = {**STEERS, **reading_steers(HIDDEN, 3), **conditions(HIDDEN, 3)}
    doses = [dose for setting in READING for dose in doses_of(setting, steers)]
    assert {type(steers[dose.steer]) for dose in doses} == set(KINDS.values()) - {ConditionSteer}
    modes = {getattr(steers[dose.steer], "mode", None) for dose in doses}
    assert modes >= {*MODES, *SAE_MODES}
    windows = [dose.phase for dose in doses if isinstance(dose.phase, TokenWindows)]
    assert any(phase.prompt for phase in windows) and any(phase.answer for phase in windows)
    assert {"answer", "last", "generation"} <= {str(dose.phase) for dose in doses}
    gates = [dose.gate for dose in doses if dose.gate]
    assert {gate.needs for gate in gates if len(gate.conditions) > 1} == {"any", "all"}
    read = [steers[name] for gate in gates for name in gate.conditions]
    for field, values in (("similarity", SIMILARITIES), ("side", SIDES), ("tokens", TOKENS)):
        assert {getattr(steer, field) for steer in read} == set(values)
    assert {steer.site for steer in read} == set(VECTOR_SITES)


def test_settings_without_a_site_name_no_steer_of_it() -> None:
    reduced = settings_without("attn_in", GUIDED, STEERS)
    assert 12 <= len(reduced) < len(GUIDED)
    assert "attn_in" not in used([name for setting in reduced for name in setting], "site")
