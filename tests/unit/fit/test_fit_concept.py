"""A concept fit as a whole, against Hugging Face's own hidden states and formulas in numpy."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fit_model import HIDDEN, LAYERS, norm_outputs, tiny_model, tiny_tokenizer

from vllm_steer import SteerError
from vllm_steer.fit import token_store as stores
from vllm_steer.fit.concept import LayerProbe, best_layers, fit_concept, split
from vllm_steer.fit.probes import Probe
from vllm_steer.fit.token_store import token_store
from vllm_steer.texts.conversations import Conversation

ANSWERS = {
    1: ["was wonderful and bright.", "was a treat!", "charmed us, every day of it.", "great."],
    0: ["was damp and dreadful.", "was a scandal!", "let us down, from the first day.", "awful."],
}
PROMPTS = ["The hotel", "The flat", "The train", "The film", "The course"]


def talk(prompt: str, answer: str, label: int) -> Conversation:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Conversation(messages, label)


TALKS = [
    talk(prompt, answer, label)
    for prompt in PROMPTS
    for label, answers in ANSWERS.items()
    for answer in answers
]


def fit(**options: Any) -> Any:
    return fit_concept(tiny_model(), tiny_tokenizer(), options.pop("talks", TALKS), **options)


def rows_by_hand(talks: list[Conversation], layer: int) -> tuple[Any, Any]:
    """Rows and labels: the answer's tokens without the last, one text at a time."""
    rows, labels = [], []
    for one in talks:
        before = tiny_tokenizer()(one.prompt)["input_ids"]
        ids = tiny_tokenizer()(" ".join(m["content"] for m in one.messages))["input_ids"]
        result = norm_outputs(tiny_model(), ids, layer)[len(before) : -1][:16]
        rows.append(result.numpy())
        labels += [one.label] * len(result)
    return np.concatenate(rows), np.array(labels)


def test_difference_in_means_uses_the_outputs_of_the_input_norm() -> None:
    result = fit(layers=[2, 0], batch_size=3)
    assert (result.steer.layers, result.steer.site, result.steer.mode) == (
        (0, 2),
        "attn_in",
        "rotate",
    )
    train, _ = split(TALKS, 0)
    for row, layer in enumerate((0, 2)):
        x, y = rows_by_hand(train, layer)
        away = x - x.mean(0)
        total = ((2 * y - 1)[:, None] * away / np.linalg.norm(away, axis=1, keepdims=True)).sum(0)
        expected = total / np.linalg.norm(total)
        np.testing.assert_allclose(
            result.steer.vectors[row].numpy(), expected, rtol=1e-5, atol=1e-7
        )
    assert result.train_tokens == len(x)


def test_accuracies_exist_for_training_and_validation_answers() -> None:
    result = fit(layers=[1], probe="logistic")
    (one,) = result.probes
    for part, score in zip(
        split(TALKS, 0), (one.train_accuracy, one.validation_accuracy), strict=True
    ):
        right = []
        for conversation in part:
            x, y = rows_by_hand([conversation], 1)
            if len(x):
                right.append(np.mean((x @ one.probe.direction > 0) == (y == 1)))
        assert score == pytest.approx(np.mean(right), abs=1e-12)
    assert result.steer.layer_scores == (one.train_accuracy,)


def test_a_prompt_is_in_training_or_in_validation() -> None:
    train, validation = split(TALKS, 0)
    assert (len(train), len(validation)) == (32, 8)  # four prompts of five, eight answers each
    assert not {one.prompt for one in train} & {one.prompt for one in validation}
    assert sorted(map(id, train + validation)) == sorted(map(id, TALKS))
    assert split(TALKS, 0) == (train, validation)
    assert len({split(TALKS, seed)[1][0].prompt for seed in range(9)}) > 1


def test_the_last_prompt_of_the_training_keeps_all_its_answers() -> None:
    talks = [talk("a", "x y", 0)] * 9 + [talk("b", "x y", 1)]
    train, validation = split(talks, 1)
    assert [one.prompt for one in train].count("a") == 9
    assert len(train) + len(validation) == 10


def probes(*train: float, validation: tuple[float | None, ...] | None = None) -> list[LayerProbe]:
    validation_scores = validation or train
    return [
        LayerProbe(4 + layer, Probe(np.ones(1)), one, other)
        for layer, (one, other) in enumerate(zip(train, validation_scores, strict=True))
    ]


def test_equal_layers_are_all_kept() -> None:
    result = probes(0.7, 0.9, 0.8, 0.8, 0.6)
    assert best_layers(result, 1, "train") == (5,)
    assert best_layers(result, 2, "train") == (5, 6, 7)
    assert best_layers(result, 3, "train") == (5, 6, 7)
    assert best_layers(result, 5, "train") == (4, 5, 6, 7, 8)


def test_layers_are_chosen_by_training_accuracy_unless_requested_otherwise() -> None:
    result = probes(0.9, 0.8, validation=(0.5, 0.7))
    assert best_layers(result, 1, "train") == (4,)
    assert best_layers(result, 1, "validation") == (5,)
    fitted = fit(top_k=1)
    scores = [one.train_accuracy for one in fitted.probes]
    assert fitted.steer.layers == tuple(i for i, s in enumerate(scores) if s == max(scores))
    assert [one.layer for one in fitted.probes] == list(range(LAYERS))


def test_the_sign_of_pca_is_unchanged_unless_requested() -> None:
    plain, signed = (fit(probe="pca", seed=3, signed=s) for s in (False, True))
    slopes = [one.probe.slope for one in plain.probes]
    assert min(slopes) < 0 < max(slopes)  # both signs: the layers do not agree
    signs = torch.tensor(slopes).sign()[:, None]
    assert torch.equal(signed.steer.vectors, plain.steer.vectors * signs)
    assert all(one.probe.slope > 0 for one in signed.probes)


def test_the_same_seed_gives_the_same_fit_whatever_the_batch() -> None:
    first, second = fit(probe="pca", batch_size=5), fit(probe="pca", batch_size=16)
    torch.testing.assert_close(first.steer.vectors, second.steer.vectors, rtol=1e-5, atol=1e-6)
    assert torch.equal(first.steer.vectors, fit(probe="pca", batch_size=5).steer.vectors)


def test_progress_is_reported_for_answers_and_layers() -> None:
    answers: list[int] = []
    layers: list[int] = []
    fit(on_answer=answers.append, on_layer=layers.append)
    assert answers == list(range(1, len(TALKS) + 1))
    assert layers == [1, 2, 3]


def test_an_answer_of_one_token_does_not_count() -> None:
    assert len(tiny_tokenizer().tokenize(" was")) == 1
    short = [*TALKS, *(talk(prompt, "was", 1) for prompt in PROMPTS)]
    result, without = fit(talks=short, layers=[0]), fit(layers=[0])
    assert result.train_answers == without.train_answers + 4
    assert result.train_tokens == without.train_tokens
    assert torch.equal(result.steer.vectors, without.steer.vectors)
    assert result.probes[0].train_accuracy == without.probes[0].train_accuracy


def test_conversations_are_cut_to_the_models_context() -> None:
    long = talk("The hotel " * 60, "was wonderful and bright.", 1)
    assert len(tiny_tokenizer()(long.prompt)["input_ids"]) > 64
    lengths: list[int] = []
    model = tiny_model()
    handle = model.model.register_forward_pre_hook(
        lambda _m, _a, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    fit(talks=[long, *TALKS], layers=[0], batch_size=1)
    handle.remove()
    assert max(lengths) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": "svm"}, "probe is 'svm'; allowed: dim, logistic, pca"),
        ({"site": "heads"}, "site is 'heads'; allowed: resid, attn_in, attn_out"),
        ({"select": "test"}, "select is 'test'; allowed: train, validation"),
        ({"layers": [3]}, "layer 3 does not exist: this model has layers 0 to 2"),
        ({"top_k": 4}, "top_k is 4; there are 3 layers to choose from"),
        (
            {"talks": [talk("a", "one two three", 1), talk("a", "b", 0)]},
            r"have 0 tokens of label 0 and \d of label 1; both are needed",
        ),
        (
            {"talks": TALKS[:8], "top_k": 1, "select": "validation"},
            "there is no answer to validate with",
        ),
    ],
)
def test_a_concept_that_cannot_be_fitted_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SteerError, match=message):
        fit(**options)


def test_without_validation_its_accuracy_is_not_known() -> None:
    assert fit(talks=TALKS[:8], layers=[0]).probes[0].validation_accuracy is None


def test_a_missing_package_is_reported_before_the_model_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    texts_read: list[int] = []
    with pytest.raises(SteerError, match=r'pip install "vllm-steer\[eval\]"'):
        fit(on_answer=texts_read.append)
    assert not texts_read


def test_stored_rows_are_read_by_layer_and_leave_no_file(tmp_path: Path) -> None:
    rows = torch.randn(7, 2, HIDDEN)
    with token_store(2, tmp_path) as store:
        store.add(rows[:3])
        store.add(rows[3:3])
        store.add(rows[3:])
        for layer in range(2):
            np.testing.assert_array_equal(store.layer(layer), rows[:, layer].numpy())
        assert list(tmp_path.iterdir()) == []  # even now: a process that is killed leaves nothing
    with pytest.raises(SteerError, match=r"no/where: takes no files \(No such file or directory\)"):
        fit(folder=tmp_path / "no/where")


def test_a_full_disk_is_a_plain_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    store = stores.TokenStore([Full()])  # type: ignore[list-item]
    with pytest.raises(SteerError, match=r"cannot be kept on disk \(No space left .* 64 bytes"):
        store.add(torch.zeros(1, 1, 16))
