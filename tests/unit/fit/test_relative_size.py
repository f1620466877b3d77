"""How much steers change activations, against the tensors of a plain hook."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from fit_model import HIDDEN, LAYERS, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from vllm_steer import DeltaSteer, SteerError, VectorSteer
from vllm_steer.cli import app
from vllm_steer.doctor import examine, read_architecture
from vllm_steer.embedded import STEER_CONFIG, corpus
from vllm_steer.fit.relative_size import (
    median_norms,
    read_activations,
    relative_size,
    size_on_texts,
)
from vllm_steer.steers import LowRankSteer, SAESteer

TEXTS = ["The hotel was wonderful.", "A scandal.", "We were let down by it, badly!"]


def ids() -> list[list[int]]:
    return [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]


@torch.no_grad()
def by_hook(layer: int) -> torch.Tensor:
    """The residual stream of all tokens but the first of each text, ``[tokens, width]``."""
    seen: list[Any] = []
    block = tiny_model().model.layers[layer]
    handle = block.register_forward_hook(lambda _m, _a, out: seen.append(out))
    for one in ids():
        tiny_model()(torch.tensor([one]))
    handle.remove()
    outputs = [out[0] if isinstance(out, tuple) else out for out in seen]
    return torch.cat([out[0, 1:] for out in outputs])


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_activations_and_their_norms_are_those_of_a_hook() -> None:
    activations = read_activations(tiny_model(), ids(), "resid")
    assert list(activations) == list(range(LAYERS))
    for layer, x in activations.items():
        torch.testing.assert_close(x, by_hook(layer), rtol=1e-12, atol=1e-12)
        expected = median(float(row.norm()) for row in by_hook(layer))
        assert median_norms(activations)[layer] <= expected  # the lower one of an even number
    assert len(read_activations(tiny_model(), ids() * 40, "resid")[0]) == 256


W = normal(2, HIDDEN)
A, B = normal(2, 3, HIDDEN), normal(2, HIDDEN, 3)
CASES = {
    "add": (VectorSteer(vectors=W, layers=(0, 2)), lambda h, row: W[row].double().norm()),
    "rotate": (VectorSteer(vectors=W, layers=(0, 2), mode="rotate"), lambda h, row: 1.0),
    "relative": (
        VectorSteer(vectors=W, layers=(0, 2), mode="relative"),
        lambda h, row: h.norm(),
    ),
    "low rank": (
        LowRankSteer(a=A, b=B, layers=(0, 2)),
        lambda h, row: (B[row].double() @ (A[row].double() @ h)).norm(),
    ),
    "delta": (
        DeltaSteer(delta=W[None].expand(3, -1, -1).contiguous(), layers=(0, 2), site="resid"),
        lambda h, row: W[row].double().norm(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_share_is_the_length_of_the_change_over_that_of_the_activation(name: str) -> None:
    steer, change = CASES[name]
    size = relative_size(steer, read_activations(tiny_model(), ids(), "resid"))
    for row, layer in enumerate(steer.layers):
        shares = sorted(float(change(h, row) / h.norm()) for h in by_hook(layer))
        assert size.layers[layer].share == pytest.approx(shares[(len(shares) - 1) // 2], rel=1e-6)
    middle = sum(size.layers[layer].share for layer in (0, 2)) / 2
    assert size.share == pytest.approx(middle)
    assert size.strength_for(0.5) == pytest.approx(0.5 / middle)
    assert f"0.1 at strength {0.1 / middle:.3g}" in size.message


def test_a_steer_that_sets_a_value_has_no_strength_for_a_share() -> None:
    row, number = torch.ones(1, HIDDEN), torch.zeros(1)
    clamp = SAESteer(encoder=row, decoder=row, bias=number, threshold=number, layers=(1,))
    ablate = VectorSteer(vectors=W[:1], layers=(1,), mode="project")
    for steer in (clamp, ablate):
        size = size_on_texts(tiny_model(), tiny_tokenizer(), steer, TEXTS)
        assert size.strength_for(0.1) is None and "at strength 1" in size.message
        assert size.data["strength_for_share"] == {"0.1": None, "0.5": None}


def test_the_fit_of_a_vector_reports_a_first_strength(tmp_path: Path) -> None:
    rows = [
        {"text": sample.text, "label": label}
        for language, label in (("fr", 1), ("en", -1))
        for sample in corpus.generate(12, seed=3, language=language)
    ]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    line = ["fit", "vector", "embedded", str(tmp_path / "v.safetensors"), "--data", str(data)]
    figures = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    size = figures["relative_size"]
    assert set(size["layers"]) == set(figures["norm"])
    for layer, one in size["layers"].items():
        assert one["change"] == pytest.approx(figures["norm"][layer], rel=1e-4)
    assert size["strength_for_share"]["0.1"] == pytest.approx(0.1 / size["share"])
    table = CliRunner().invoke(app, [*line, "--force"])
    assert "|h|" in table.stdout and "0.5 at strength" in table.stdout


def test_the_doctor_reports_sizes_and_first_strengths() -> None:
    architecture = read_architecture("embedded")
    findings = examine(
        architecture, engine=False, sizes=True, dtype="float32", steer_config=str(STEER_CONFIG)
    )
    found = {finding.name: finding for finding in findings if finding.part == "sizes"}
    norms = found["|h| at resid"].figures["layers"]
    figures = found["sentiment-vector"].figures
    (layer,) = figures["layers"]
    one = figures["layers"][layer]
    assert one["activation"] == pytest.approx(norms[int(layer)])
    assert figures["strength_for_share"]["0.5"] == pytest.approx(0.5 / one["share"])
    assert "french" not in found  # an LM-Steer
    quiet = examine(architecture, engine=False, steer_config=str(STEER_CONFIG))
    assert not any(finding.part == "sizes" for finding in quiet)


def test_a_model_that_cannot_be_loaded_is_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_steer.doctor import sizes

    def fail(*_: Any) -> Any:
        raise SteerError("no weights")

    monkeypatch.setattr(sizes, "load_model", fail)
    findings = examine(read_architecture("embedded"), engine=False, sizes=True)
    found = [finding for finding in findings if finding.part == "sizes"]
    assert [(one.state, one.message) for one in found] == [("not tested", "no weights")]


def test_long_texts_are_cut_off_and_texts_of_one_token_are_read() -> None:
    context = tiny_model().config.max_position_embeddings
    assert len(read_activations(tiny_model(), [[3] * 200], "resid")[0]) == context - 1
    assert len(read_activations(tiny_model(), [[3], [4]], "resid")[0]) == 2
    with pytest.raises(SteerError, match="the texts have no tokens"):
        read_activations(tiny_model(), [[]], "resid")
