"""Judge specifications: valid, unavailable and invalid ones."""

from importlib import import_module
from typing import Any

import pytest

from vllm_steer import SteerError, optional
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.judges import FORMS, JudgeUnavailableError, make_judge, make_judges

SPECS = (
    "perplexity:embedded",
    "diversity",
    "repetition",
    "lexicon:embedded:sentiment",
    "lexicon:embedded:language=fr",
)


def test_judges_are_made_in_order_under_their_specs() -> None:
    judges, missing = make_judges(SPECS, device="cpu")
    assert tuple(judge.name for judge in judges) == SPECS
    assert missing == {}


def test_a_spec_that_is_given_twice_is_one_judge() -> None:
    judges, _ = make_judges(["diversity", "repetition", "diversity"])
    assert [judge.name for judge in judges] == ["diversity", "repetition"]


def test_the_effect_is_one_of_the_figures() -> None:
    answers = [Answers("The hotel was", (" wonderful.", " awful."))]
    for judge in make_judges(SPECS, device="cpu")[0]:
        assert judge.effect is None or judge.effect in judge.scores(answers)


def test_unavailable_judges_are_named_with_the_reason() -> None:
    specs = ["perplexity:nobody/nothing", "diversity", "classifier:nobody/nothing", "perspective"]
    judges, missing = make_judges(specs)
    assert [judge.name for judge in judges] == ["diversity"]
    assert list(missing) == [specs[0], specs[2], specs[3]]
    assert missing[specs[0]].startswith("model nobody/nothing: no tokenizer can be loaded (")
    assert missing[specs[2]].startswith("model nobody/nothing: cannot be loaded (")
    assert "is a network service" in missing["perspective"]


def test_a_missing_package_makes_a_judge_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        if name.startswith("langdetect"):
            raise ImportError(name)
        return import_module(name)

    monkeypatch.setattr(optional, "import_module", without)
    _, missing = make_judges(["language:fr"])
    assert missing["language:fr"] == (
        'the package langdetect is needed and not installed; pip install "vllm-steer[eval]"'
    )


@pytest.mark.parametrize(
    "spec",
    [
        "toxicity",
        "",
        "diversity:3",
        "repetition:",
        "perplexity",
        "perplexity:",
        "classifier",
        "classifier::POSITIVE",
        "classifier:model:POSITIVE:prompt",
        "language",
        "lexicon",
        "perspective:TOXICITY",
    ],
)
def test_a_misspelt_judge_is_an_error_with_the_forms(spec: str) -> None:
    with pytest.raises(SteerError) as raised:
        make_judges([spec])
    assert str(raised.value) == f"judge {spec!r} is unknown; available: " + ", ".join(FORMS)
    assert not isinstance(raised.value, JudgeUnavailableError)


def test_an_error_of_the_spec_is_not_an_unavailable_judge() -> None:
    with pytest.raises(SteerError):
        make_judges(["lexicon:missing.yaml"])
    with pytest.raises(JudgeUnavailableError):
        make_judge("perspective")
