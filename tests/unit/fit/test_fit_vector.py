"""Vectors from pairs, from the last token and from answers, against numpy and scikit-learn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fit_model import LAYERS, norm_outputs, tiny_model, tiny_tokenizer
from sklearn.decomposition import PCA

from vllm_steer import SteerError
from vllm_steer.fit import fit_vector
from vllm_steer.fit.activations import SelectedTokens, read_tokens
from vllm_steer.fit.pairs import read_pairs, sides_of
from vllm_steer.fit.vector import first_component
from vllm_steer.texts import LabelledText

POSITIVE = ["The hotel was wonderful.", "We were charmed by it!", "A treat, all of it.", "Lovely."]
NEGATIVE = ["The hotel was damp.", "We were let down by it, badly!", "A scandal.", "Dreadful, so."]


def tokens_of(text: str, layer: int, site: str = "resid") -> torch.Tensor:
    """Every token but the first special one, ``[tokens, width]``, from Hugging Face's outputs."""
    ids = tiny_tokenizer()(text)["input_ids"]
    if site == "attn_in":
        return norm_outputs(tiny_model(), ids, layer)[1:]
    tokens: list[Any] = []  # hidden_states has the last layer's output only behind the final norm
    block = tiny_model().model.layers[layer]
    hook = block.register_forward_hook(lambda _m, _a, out: tokens.append(out))
    tiny_model()(torch.tensor([ids]))
    hook.remove()
    return tokens[0][0][1:]


def test_activations_equal_the_hidden_states_of_transformers() -> None:
    ids = tiny_tokenizer()(POSITIVE[0])["input_ids"]
    states = tiny_model()(torch.tensor([ids]), output_hidden_states=True).hidden_states
    texts = [SelectedTokens(ids[:2], []), SelectedTokens(ids, [0, 3]), SelectedTokens(ids[:3], [2])]
    result = list(read_tokens(tiny_model(), texts, site="resid", layers=(0, 1), batch_size=2))
    assert [list(x.shape[:2]) for x in result] == [[0, 2], [2, 2], [1, 2]]
    for column in range(2):
        expected = states[column + 1][0]
        torch.testing.assert_close(result[1][:, column], expected[[0, 3]], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result[2][:, column], expected[[2]], rtol=1e-12, atol=1e-12)


def fit(positive: Any = POSITIVE, negative: Any = NEGATIVE, **options: Any) -> Any:
    return fit_vector(tiny_model(), tiny_tokenizer(), positive, negative, **options)


@pytest.mark.parametrize(("tokens", "site"), [("all", "attn_in"), ("last", "resid")])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_pca_is_the_first_component_of_the_pairs_differences(
    tokens: Any, site: Any, batch_size: int
) -> None:
    steer = fit(direction="pca", tokens=tokens, batch_size=batch_size, site=site)
    for layer in range(LAYERS):
        pooled = [
            [(x.mean(0) if tokens == "all" else x[-1]).numpy() for x in side]
            for side in (
                [tokens_of(text, layer, site) for text in texts] for texts in (POSITIVE, NEGATIVE)
            )
        ]
        differences = np.array(pooled[0]) - np.array(pooled[1])
        expected = PCA(n_components=1).fit(differences).components_[0]
        result = steer.vectors[layer].double().numpy()
        assert abs(result @ expected) == pytest.approx(1, abs=1e-6)
        assert np.linalg.norm(result) == pytest.approx(1, abs=1e-6)
        higher = sum(p @ result > n @ result for p, n in zip(*pooled, strict=True))
        assert higher >= 2  # the positive text of a pair is not lower in most of the four


def test_pca_is_oriented_to_most_positive_texts() -> None:
    differences = torch.tensor([[1.0, 0.1], [2.0, 0.0], [-9.0, 0.0]], dtype=torch.float64)
    # The far pair has the larger sum; two of three pairs decide all the same.
    assert first_component(differences, 0)[0] > 0.99
    assert first_component(-differences, 0)[0] < -0.99


def test_mean_of_the_last_tokens() -> None:
    steer = fit(tokens="last")
    for layer in range(LAYERS):
        sides = [
            torch.stack([tokens_of(text, layer)[-1] for text in texts]).mean(0)
            for texts in (POSITIVE, NEGATIVE)
        ]
        expected = sides[0] - sides[1]
        torch.testing.assert_close(steer.vectors[layer].double(), expected, rtol=1e-6, atol=1e-7)


def test_only_the_tokens_of_the_answer_count() -> None:
    positive = [("The hotel was", " wonderful and bright."), ("The flat", " charmed us.")]
    negative = [("The hotel was", " damp.")]
    steer = fit(positive, negative, tokens="answer", layers=[1])

    def answer(prompt: str, text: str) -> torch.Tensor:
        before = len(tiny_tokenizer().tokenize(prompt))
        return tokens_of(prompt + text, 1)[before:]

    sides = [torch.cat([answer(*text) for text in texts]) for texts in (positive, negative)]
    assert len(sides[0]) == len(tiny_tokenizer().tokenize(positive[0][1])) + len(
        tiny_tokenizer().tokenize(positive[1][1])
    )
    expected = sides[0].mean(0) - sides[1].mean(0)
    torch.testing.assert_close(steer.vectors[0].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Before any attention a full stop is a full stop, whatever it ends.
        (
            {"direction": "pca", "tokens": "last", "site": "attn_in"},
            "all pairs differ alike in layer 0, or not at all",
        ),
        ({"tokens": "first"}, "tokens is 'first'; allowed: all, last, answer"),
        ({"tokens": "answer"}, "text 'The hotel was wonderful.' has no prompt"),
        ({"direction": "pca", "negative": NEGATIVE[:1]}, "4 positive and 1 negative texts; pca"),
        (
            {"direction": "pca", "positive": POSITIVE[:1], "negative": NEGATIVE[:1]},
            "pca takes pairs, at least two",
        ),
        (
            {"positive": [("The hotel was", " dry.")], "tokens": "answer", "max_length": 3},
            "the answer ' dry.' has no token among the 3 that are read",
        ),
    ],
)
def test_a_vector_that_cannot_be_fitted_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        fit(**arguments)


def test_pairs_are_read_with_their_prompts(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"positive": "good", "negative": "bad"},
        {"prompt": "It was", "positive": " good", "negative": " bad"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    sides = read_pairs(path)
    assert sides.positive == ["good", ("It was", " good")]
    assert sides.negative == ["bad", ("It was", " bad")]


def test_a_pair_without_a_side_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"positive": "good", "negative": "bad"}\n\n{"positive": "good"}\n')
    with pytest.raises(
        SteerError, match=r"pairs.jsonl:3: the field 'negative' is missing; the row has"
    ):
        read_pairs(path)
    path.write_text("")
    with pytest.raises(SteerError, match="there are no rows"):
        read_pairs(path)


def test_the_sign_of_a_label_is_the_side() -> None:
    texts = [LabelledText("a", 0.5), LabelledText("b", -1.0), LabelledText("c", 0.0)]
    assert sides_of(texts) == (["a"], ["b"])
