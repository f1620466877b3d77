"""The doctor's comparison of an engine's output with the reference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from doctor_tools import SMALL, add_steer, by_name

from vllm_steer import LMSteer, embedded
from vllm_steer.doctor import Finding, parity
from vllm_steer.doctor.architecture import read_architecture
from vllm_steer.doctor.engine_process import Completion, EngineOutput
from vllm_steer.doctor.parity import score_all, zero_steers
from vllm_steer.doctor.report import failed
from vllm_steer.doctor.trials import prompts


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(embedded.MODEL).eval()


@torch.no_grad()
def greedy(model: Any, steer: LMSteer | None, prompt: list[int], strength: float) -> Completion:
    """Greedy tokens of softmax(W (c + epsilon v A)), with one forward pass per token."""
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(6):
        hidden = model.model(torch.tensor([prompt + tokens])).last_hidden_state[0, -1]
        if steer is not None:
            hidden = hidden + steer.epsilon * strength * steer.add[0]
        choices = (model.lm_head.weight @ hidden).log_softmax(-1)
        tokens.append(int(choices.argmax()))
        logprobs.append(float(choices.max()))
    return Completion({"it": strength} if steer else {}, prompt, tokens, logprobs)


def engine_output(model: Any, steer: LMSteer, strength: float = 1.0) -> EngineOutput:
    prompts = [[5, 6, 7], [40, 50, 60, 70]]
    unsteered = [greedy(model, None, prompt, 0) for prompt in prompts]
    large = [greedy(model, steer, prompt, strength) for prompt in prompts]
    batches = {"unsteered": unsteered, "zero": unsteered, "large": large}
    return EngineOutput(dtype="float32", runner="V1", device="cpu", batches=batches)


def compare(model: Any, steers: Any, output: EngineOutput) -> Any:
    return parity.compare(steers, output, score_all(model, steers, output))


def test_outputs_by_the_formula_pass(model: Any) -> None:
    steer = add_steer()
    findings = by_name(compare(model, {"it": steer}, engine_output(model, steer)))
    assert [findings[name].state for name in ("unsteered", "it")] == ["ok", "ok"]
    assert findings["it"].figures["difference"] < 1e-4
    assert findings["it"].figures["agreement"] == 1
    assert findings["it"].figures["effect"] > 0.1


def test_a_wrong_reference_is_reported_as_failed(model: Any) -> None:
    findings = by_name(compare(model, {"it": add_steer(2)}, engine_output(model, add_steer(1))))
    assert findings["unsteered"].state == "ok"
    assert findings["it"].state == "FAILED" and "not steered" not in findings["it"].message
    assert failed(list(findings.values()))


def test_an_engine_that_does_not_steer_is_reported_as_such(model: Any) -> None:
    answers = engine_output(model, add_steer())
    plain = [replace(a, setting={"it": 1.0}) for a in answers.batches["unsteered"]]
    answers.batches["large"] = plain
    findings = by_name(compare(model, {"it": add_steer()}, answers))
    assert findings["it"].state == "FAILED"
    assert findings["it"].message.startswith(
        "not steered: the output is that of the unsteered model"
    )


def test_a_steer_with_too_small_an_effect_is_not_tested(model: Any) -> None:
    weak = add_steer(size=1e-4)
    findings = by_name(compare(model, {"it": weak}, engine_output(model, weak)))
    assert (
        findings["it"].state == "not tested"
        and "too small a change to verify" in findings["it"].message
    )


def test_a_token_other_than_the_references_choice_fails_with_a_correct_logprob(
    model: Any,
) -> None:
    answers = engine_output(model, add_steer())
    first = answers.batches["unsteered"][0]
    with torch.no_grad():
        logits = model(torch.tensor([first.prompt])).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    wrong_output = replace(first, tokens=[second], logprobs=[float(logits.log_softmax(-1)[second])])
    answers.batches["unsteered"] = [wrong_output]
    assert by_name(compare(model, {}, answers))["unsteered"].state == "FAILED"


def test_the_tolerance_of_half_precision_is_the_rounding_of_the_model_itself(model: Any) -> None:
    """Three times the distance of the reference in that dtype from the one in float32."""
    steers = {"it": add_steer(size=3)}

    def judged(off: float, rounding: float) -> Finding:
        answers = replace(engine_output(model, steers["it"]), dtype="bfloat16")
        answers.batches["large"] = [
            replace(one, logprobs=[value - off for value in one.logprobs])
            for one in answers.batches["large"]
        ]
        exact = score_all(model, steers, answers)
        moved = [replace(one, tokens=one.tokens + rounding) for one in exact.steered["it"]]
        rounded = replace(exact, steered={"it": moved})
        return by_name(parity.compare(steers, answers, exact, rounded))["it"]

    assert judged(0.04, 0.0).state == "ok"
    assert judged(0.06, 0.0).state == "FAILED"
    assert judged(0.28, 0.1).state == "ok"
    assert judged(0.32, 0.1).state == "FAILED"
    large = judged(0.0, 1e3)
    assert large.state == "not tested" and "too small a change" in large.message
    assert large.figures["rounding"] == pytest.approx(1e3, rel=1e-3)


def test_zero_steers_must_keep_every_bit(model: Any) -> None:
    answers = engine_output(model, add_steer())
    assert zero_steers(answers).state == "ok"
    first, second = answers.batches["zero"]
    bit = [torch.nextafter(torch.tensor(x), torch.tensor(0.0)).item() for x in first.logprobs]
    answers.batches["zero"] = [replace(first, logprobs=bit), second]
    assert zero_steers(answers).state == "FAILED"
    assert zero_steers(EngineOutput()).state == "not tested"


def test_steers_without_an_engine_output_are_not_tested(model: Any) -> None:
    answers = engine_output(model, add_steer())
    del answers.batches["large"]
    findings = by_name(compare(model, {"it": add_steer()}, answers))
    assert (findings["unsteered"].state, findings["it"].state) == ("ok", "not tested")


@pytest.mark.parametrize(
    "ids", [None, [], [3], [3, 500]], ids=["no tokenizer", "empty", "one", "not its own"]
)
def test_a_model_without_a_tokenizer_of_its_own_is_given_random_tokens(
    ids: list[int] | None, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    tokenizer = None if ids is None else lambda _text: {"input_ids": ids}
    token_ids = prompts(read_architecture(str(tmp_path)), tokenizer)
    assert [len(row) for row in token_ids] == [8] * 4
    assert all(0 <= token < 500 for row in token_ids for token in row)
    assert len({tuple(row) for row in token_ids}) == 4
