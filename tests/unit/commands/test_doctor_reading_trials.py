"""The doctor's trials of steers that read the token, of a window and of a condition."""

from typing import Any

import pytest
import torch
import transformers

from vllm_steer import embedded
from vllm_steer.doctor import Architecture, read_architecture
from vllm_steer.doctor.engine_process import Completion, EngineOutput
from vllm_steer.doctor.parity import PLAIN, TOLERANCE, compare, score_all
from vllm_steer.doctor.parity_trials import ParityTrials
from vllm_steer.doctor.parity_trials import without_refused as kept_by
from vllm_steer.doctor.reading_trials import GATED, reading_trials
from vllm_steer.doctor.reference import Scores, score
from vllm_steer.doctor.trials import prompts
from vllm_steer.models import load_tokenizer
from vllm_steer.steers import ConditionSteer, SAESteer, VectorSteer

NAMES = {
    *("resid-project", "resid-relative", "resid-clamp", "resid-low_rank", "resid-window"),
    *("resid-when", "attn_in-relative", "attn_in-low_rank", "attn_out-project", "attn_out-scale"),
}
SEEN = PLAIN * TOLERANCE["float32"]
ANSWER = [40, 7, 99, 12, 63, 5, 81, 30]


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return read_architecture("embedded")


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(embedded.MODEL).eval()


@pytest.fixture(scope="module")
def trials(model: Any, architecture: Architecture) -> ParityTrials:
    texts = prompts(architecture, load_tokenizer("embedded"))
    return ParityTrials(*reading_trials(model, architecture, texts), texts)


def scores(model: Any, trials: ParityTrials, setting: dict[str, Any]) -> list[Scores]:
    """The reference's scores of one answer to each prompt."""
    completions = [Completion(setting, p, ANSWER, [0.0] * len(ANSWER)) for p in trials.prompts]
    return [score(model, one, trials.steers) for one in completions]


def distances(one: list[Scores], other: list[Scores]) -> list[float]:
    """By prompt the largest difference of a token's log-probability."""
    return [float((a.tokens - b.tokens).abs().max()) for a, b in zip(one, other, strict=True)]


def test_there_is_a_trial_of_every_way_and_each_is_named_like_its_steer(
    trials: ParityTrials,
) -> None:
    assert set(trials.options) == NAMES
    assert set(trials.steers) == {*NAMES, "condition"}
    (zero,) = trials.batches["zero"]
    assert set(zero) == NAMES and all(options["strength"] == 0 for options in zero.values())
    assert zero[GATED]["when"] == "condition"
    assert len(trials.batches["large"]) == len(NAMES)


def test_a_missing_change_would_be_seen(model: Any, trials: ParityTrials) -> None:
    unsteered = scores(model, trials, {})
    for name, options in trials.options.items():
        moved = distances(scores(model, trials, {name: options}), unsteered)
        assert max(moved) > 100 * SEEN, name


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("resid-project", {"low": 0.0, "high": 0.0}),
        ("attn_out-project", {"low": -1.0}),
        ("resid-clamp", {"low": 0.0, "high": 0.0}),
        ("resid-window", {"phase": "all"}),
        ("resid-window", {"phase": {"answer": "2:6"}}),
        ("resid-window", {"phase": {"prompt": "1:3", "answer": "2:7"}}),
        ("resid-when", {"when": None, "phase": "answer"}),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_other_bounds_windows_or_verdicts_would_be_seen(
    model: Any, trials: ParityTrials, name: str, wrong: dict[str, Any]
) -> None:
    right = dict(trials.options[name])  # type: ignore[call-overload]
    other = scores(model, trials, {name: {**right, **wrong}})
    assert max(distances(scores(model, trials, {name: right}), other)) > SEEN


def test_what_a_steer_reads_counts(model: Any, trials: ParityTrials) -> None:
    """A projection along another direction, and a feature of another encoder, differ."""
    for name in ("resid-project", "attn_out-project", "resid-clamp", "attn_out-scale"):
        steer = trials.steers[name]
        if isinstance(steer, VectorSteer):
            other: Any = {**vars(steer), "vectors": steer.vectors.flip(1)}
        else:
            assert isinstance(steer, SAESteer)
            other = {**vars(steer), "encoder": steer.encoder.flip(1)}
        wrong = ParityTrials(
            {name: type(steer)(**other)}, {name: trials.options[name]}, trials.prompts
        )
        setting = {name: trials.options[name]}
        moved = distances(scores(model, trials, setting), scores(model, wrong, setting))
        assert max(moved) > 100 * SEEN, name


def test_the_condition_holds_for_some_prompts_and_not_for_others(
    model: Any, trials: ParityTrials
) -> None:
    moved = distances(
        scores(model, trials, {GATED: trials.options[GATED]}), scores(model, trials, {})
    )
    held = [distance for distance in moved if distance > 0]
    assert 0 < len(held) < len(moved) and min(held) > SEEN


def test_no_similarity_of_a_prompt_is_near_the_threshold(model: Any, trials: ParityTrials) -> None:
    condition = trials.steers["condition"]
    assert isinstance(condition, ConditionSteer)
    w, (layer,) = condition.vector[0].double(), condition.layers
    with torch.no_grad():
        for ids in trials.prompts:
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            h = states.hidden_states[layer + 1][0, -1].double()
            similarity = float(h @ w / h.norm() / w.norm())
            assert abs(similarity - condition.threshold) > 0.02


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"kv_transfer_config": {"kv_connector": "X"}}, "kv_transfer_config"),
        ({"pipeline_parallel_size": 1, "kv_transfer_config": None}, ""),
    ],
    ids=["stages", "connector", "neither"],
)
def test_a_condition_that_the_engine_refuses_is_not_tested(
    model: Any, trials: ParityTrials, options: dict[str, Any], reason: str
) -> None:
    kept = kept_by(trials, options)
    if not reason:
        assert kept is trials
        return
    assert set(kept.steers) == set(kept.options) == NAMES - {GATED}
    assert kept.not_tested == {GATED: f"the engine refuses conditions with {reason}"}


def test_an_engine_that_ignores_the_condition_fails(model: Any, trials: ParityTrials) -> None:
    """Its answers are those of the steer in every request."""
    options = dict(trials.options[GATED])  # type: ignore[call-overload]
    steers = {name: trials.steers[name] for name in (GATED, "condition")}

    def output(setting: dict[str, Any]) -> list[Completion]:
        completions = [Completion(setting, p, ANSWER, [0.0] * len(ANSWER)) for p in trials.prompts]
        return [
            Completion({GATED: options}, c.prompt, ANSWER, score(model, c, steers).tokens.tolist())
            for c in completions
        ]

    for wrong, state in (({}, "ok"), ({"when": None, "phase": "answer"}, "FAILED")):
        engine = EngineOutput(
            dtype="float32",
            batches={"unsteered": [], "large": output({GATED: {**options, **wrong}})},
        )
        engine.batches["unsteered"] = [
            Completion({}, c.prompt, c.tokens, [0.0] * len(ANSWER)) for c in engine.batches["large"]
        ]
        exact = score_all(model, steers, engine)
        # The tokens are given and not chosen: only the differences are judged here.
        findings = {f.name: f for f in compare(steers, engine, exact)}
        assert (findings[GATED].figures["difference"] < 1e-3) == (state == "ok")
        assert "condition" not in findings
