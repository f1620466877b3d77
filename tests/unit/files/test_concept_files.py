"""concept-guidance's files: a probe per layer, rotated to at the input norm."""

from pathlib import Path

import pytest
import torch
from outside import CONCEPT_VECTORS, needs
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig
from untrusted_text_tools import SIGNED, WIDTH, write_concept

from vllm_steer import SteerError, hf, load_steer, save_steer

with_the_authors_files = needs(CONCEPT_VECTORS)


def test_concept_vectors_rotate_at_the_input_norm_of_every_layer(tmp_path: Path) -> None:
    w = torch.randn(4, WIDTH)
    steer = load_steer(write_concept(tmp_path / "w", W=w, a=SIGNED))
    assert (steer.kind, steer.site, steer.mode) == ("vector", "attn_in", "rotate")
    assert steer.layers == (0, 1, 2, 3)
    assert torch.equal(steer.vectors, w)


def test_orient_negates_the_rows_with_negative_a(tmp_path: Path) -> None:
    w = torch.randn(4, WIDTH)
    path = write_concept(tmp_path / "w", W=w, a=SIGNED)
    assert torch.equal(
        load_steer(path, orient=True).vectors, torch.stack([w[0], -w[1], w[2], -w[3]])
    )
    assert torch.equal(load_steer(path, orient=False).vectors, w)


def test_orient_without_a_sign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="orient needs the tensor a, and the file has none"):
        load_steer(write_concept(tmp_path / "logistic"), orient=True)
    broken = torch.tensor([[1.0], [0.0], [-1.0], [torch.nan]])
    with pytest.raises(SteerError, match="tensor a has 1 values that are NaN or infinite"):
        load_steer(write_concept(tmp_path / "broken", a=broken), orient=True)
    unclear = torch.tensor([[1.0], [0.0], [-1.0], [0.0]])
    with pytest.raises(SteerError, match="tensor a has no sign for layer 1,3"):
        load_steer(write_concept(tmp_path / "unclear", a=unclear), orient=True)


def test_overrides_replace_the_defaults_of_a_concept_file(tmp_path: Path) -> None:
    path = write_concept(tmp_path / "w")
    steer = load_steer(path, layers="1,3", site="attn_out", mode="add", default_strength=8)
    assert (steer.layers, steer.site, steer.mode) == ((1, 3), "attn_out", "add")
    assert steer.default_strength == 8.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"b": torch.zeros(WIDTH)}, "metadata format is None"),
        ({"a": torch.zeros(3, 1)}, "metadata format is None"),
        ({"W": torch.randn(4, WIDTH, 1)}, "metadata format is None"),
        ({"c": torch.zeros(4)}, "metadata format is None"),
        ({"W": torch.full((4, WIDTH), torch.nan)}, "W has 24 values that are NaN"),
        ({"W": torch.ones(4, WIDTH).int()}, "W is torch.int32; expected a floating dtype"),
        ({"W": torch.zeros(4, WIDTH)}, "the vector of layer 0-3 is zero"),
    ],
    ids=["a-linear-layer", "a-of-3", "three-dimensions", "another-tensor", "nan", "int", "zero"],
)
def test_files_that_only_look_like_concept_vectors_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        load_steer(write_concept(tmp_path / "w", **tensors))


@with_the_authors_files
@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("Llama-2-7b-chat-hf/humor", (12.418, 34.019)),
        ("Llama-2-7b-chat-hf/quality", (1.0, 1.0)),
        ("Llama-2-7b-hf/truthfulness", (7.630, 22.576)),
        ("Mistral-7B-Instruct-v0.1/compliance", (1.0, 1.0)),
    ],
    ids=["humor", "quality", "truthfulness", "compliance"],
)
def test_the_authors_concept_vectors_are_unchanged_by_conversion(
    tmp_path: Path, name: str, norms: tuple[float, float]
) -> None:
    path = CONCEPT_VECTORS / f"{name}.safetensors"
    save_steer(load_steer(path), tmp_path / "own")
    steer = load_steer(tmp_path / "own")
    assert (steer.layers, steer.hidden_size) == (tuple(range(32)), 4096)
    assert (steer.site, steer.mode) == ("attn_in", "rotate")
    w = load_file(path)["W"].double()
    cosines = torch.cosine_similarity(steer.vectors.double(), w, dim=1)
    assert torch.allclose(cosines, torch.ones(32, dtype=torch.float64), atol=1e-12)
    lengths = steer.vectors.norm(dim=1)
    assert (lengths.min().item(), lengths.max().item()) == pytest.approx(norms, abs=1e-3)


class InputNorms(nn.Module):
    """Thirty-two blocks of which nothing is left but the output of the input norm."""

    config = LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=32, hidden_size=4096)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_layernorm = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen: torch.Tensor = self.input_layernorm(x)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block() for _ in range(32))

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


@with_the_authors_files
@pytest.mark.parametrize("strength", [-16.0, 8.0])
def test_the_authors_humor_vectors_rotate_as_their_formula_does(strength: float) -> None:
    path = CONCEPT_VECTORS / "Llama-2-7b-chat-hf/humor.safetensors"
    x = torch.randn(1, 3, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = InputNorms()
    with hf.steered(model, {"humor": strength}, {"humor": load_steer(path)}):
        assert torch.equal(model(x), x)
    for layer, w in zip(model.layers, load_file(path)["W"].double(), strict=True):
        rotated = x + strength * w / w.norm()
        rotated = rotated * x.norm(dim=-1, keepdim=True) / rotated.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(layer.seen, rotated, rtol=1e-12, atol=1e-12)
