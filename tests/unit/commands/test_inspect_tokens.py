"""Nearest tokens, compared with scores by hand; output embeddings, with those of loaded models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vllm_steer import LMSteer, SteerError, VectorSteer
from vllm_steer.embedded import MODEL
from vllm_steer.inspection import nearest_tokens, read_output_embedding
from vllm_steer.steers import DeltaSteer

WORDS = ("bad", "good", "so", "great")
# The last row is padding that no token has; without care it would be the highest of all.
EMBEDDING = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [2.0, -1.0], [9.0, 9.0]])


def tokenizer(vocabulary: tuple[str, ...] = WORDS) -> Any:
    # In no order, as a hash map's.
    table = {word: vocabulary.index(word) for word in sorted(vocabulary)}
    return SimpleNamespace(get_vocab=lambda: table, decode=lambda ids: vocabulary[ids[0]])


def texts(tokens: Any) -> list[str]:
    return [token.text for token in tokens]


def add(*rows: list[float], **fields: Any) -> LMSteer:
    return LMSteer(variant="add", epsilon=0.1, hidden_size=2, add=torch.tensor(rows), **fields)


def test_scores_of_an_add_column_are_the_embedding_times_it() -> None:
    (near,) = nearest_tokens(add([1.0, 0.0]), EMBEDDING, tokenizer(), count=2)
    assert [(t.id, t.token, t.score) for t in near.highest] == [(3, "great", 2), (1, "good", 1)]
    assert [(t.id, t.token, t.score) for t in near.lowest] == [(0, "bad", -2), (2, "so", 0)]
    assert (near.label, near.weight) == ("column 0", 1)


def test_padding_rows_of_the_embedding_are_no_tokens() -> None:
    (near,) = nearest_tokens(add([1.0, 1.0]), EMBEDDING, tokenizer(), count=20)
    assert texts(near.highest) == ["so", "good", "great", "bad"]
    assert texts(near.lowest) == ["bad", "great", "good", "so"]


def test_fixed_columns_are_left_out() -> None:
    steer = add([1.0, 0.0], [0.0, 1.0], fixed_columns=(0,))
    assert [near.label for near in nearest_tokens(steer, EMBEDDING, tokenizer())] == ["column 1"]


def test_an_offset_is_its_own_token_scores() -> None:
    steer = LMSteer(
        variant="offset",
        epsilon=0.1,
        hidden_size=2,
        offset=torch.tensor([[0.0, 5.0, -1.0, 2.0, 70.0]]),
    )
    (near,) = nearest_tokens(steer, EMBEDDING, tokenizer(), count=2)
    assert texts(near.highest) == ["good", "great"]
    assert texts(near.lowest) == ["so", "bad"]


def test_right_singular_vectors_are_scored_and_not_left_ones() -> None:
    # W = P1 P2^T with rank 1: its right vector is P2, here along the second axis.
    steer = LMSteer(
        variant="multiply",
        epsilon=0.1,
        hidden_size=2,
        projector1=torch.tensor([[[7.0], [0.0]]]),
        projector2=torch.tensor([[[0.0], [2.0]]]),
    )
    (near,) = nearest_tokens(steer, EMBEDDING, tokenizer(), count=1)
    assert near.weight == pytest.approx(14)
    assert {near.highest[0].text, near.lowest[0].text} == {"so", "great"}
    assert {abs(near.highest[0].score), abs(near.lowest[0].score)} == {3.0, 1.0}


def test_leading_layers_are_those_of_the_highest_scores() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 9.0], [-1.0, 0.0]])
    layers = (2, 3, 5)
    plain = VectorSteer(vectors=vectors, layers=layers)
    scored = VectorSteer(vectors=vectors, layers=layers, layer_scores=(0.7, 0.6, 0.9))
    nearest = [nearest_tokens(s, EMBEDDING, tokenizer(), top=2) for s in (plain, scored)]
    assert [[near.label for near in entry] for entry in nearest] == [
        ["layer 3", "layer 2"],
        ["layer 5", "layer 2"],
    ]
    assert texts(nearest[1][0].highest)[0] == "bad"


def test_leading_rows_of_a_delta_are_those_of_the_highest_norms() -> None:
    delta = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [0.5, 0.0]]])
    steer = DeltaSteer(delta=delta, layers=(4, 7), site="resid")
    nearest = nearest_tokens(steer, EMBEDDING, tokenizer(), top=2)
    assert [near.label for near in nearest] == ["layer 4, step 1", "layer 7, step 0"]


def test_a_partial_character_is_shown_as_in_the_vocabulary() -> None:
    broken = tokenizer(("bad", "Ã", "\u0120", "great"))
    broken.decode = lambda ids: {0: "bad", 1: "\ufffd", 2: " ", 3: "great"}[ids[0]]
    (near,) = nearest_tokens(add([0.0, 1.0]), EMBEDDING, broken)
    assert texts(near.highest) == ["\u0120", "Ã", "bad", "great"]


@pytest.mark.parametrize("site", ["attn_in", "heads"])
def test_a_site_that_the_head_does_not_read_is_refused(site: Any) -> None:
    steer = DeltaSteer(delta=torch.ones(1, 1, 2), layers=(0,), site=site)
    with pytest.raises(SteerError, match=f"a steer at the site {site} has no nearest tokens"):
        nearest_tokens(steer, EMBEDDING, tokenizer())


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (
            VectorSteer(vectors=torch.ones(1, 3), layers=(0,), base_model="theirs"),
            r"width 3 and the model 2; give the model that the steer was fitted to \(theirs\)",
        ),
        (
            LMSteer(variant="offset", epsilon=0.1, hidden_size=2, offset=torch.ones(1, 4)),
            "the steer has width 4 and the model 5; give the model that the steer was fitted to$",
        ),
    ],
    ids=["hidden size", "vocabulary"],
)
def test_a_steer_of_another_width_is_refused(steer: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        nearest_tokens(steer, EMBEDDING, tokenizer())


def saved(folder: Path, **changes: Any) -> Path:
    """Save a small Llama; its head is untied unless a keyword ties it."""
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        **{"tie_word_embeddings": False, **changes},
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.get_output_embeddings().weight.detach()


@pytest.fixture
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make every later load of a model fail."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model is loaded")

    return lambda: monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_is_read_without_the_model(
    tmp_path: Path, no_model_is_loaded: Any, tied: bool
) -> None:
    expected = loaded(saved(tmp_path, tie_word_embeddings=tied))
    no_model_is_loaded()
    assert torch.equal(read_output_embedding(str(tmp_path)), expected)


def test_the_embedded_model_is_known_by_name(no_model_is_loaded: Any) -> None:
    no_model_is_loaded()
    expected = load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(read_output_embedding("embedded"), expected)


def test_the_embedding_is_read_from_its_shard(tmp_path: Path, no_model_is_loaded: Any) -> None:
    expected = loaded(saved(tmp_path))
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    head = {"lm_head.weight": whole.pop("lm_head.weight")}
    weight_map = {name: "model-00001-of-00002.safetensors" for name in whole}
    weight_map |= {name: "model-00002-of-00002.safetensors" for name in head}
    save_file(head, tmp_path / "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    no_model_is_loaded()  # nor is the other shard there
    assert torch.equal(read_output_embedding(str(tmp_path)), expected)


def test_a_checkpoint_without_the_base_models_name_is_read(
    tmp_path: Path, no_model_is_loaded: Any
) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    no_model_is_loaded()
    assert torch.equal(read_output_embedding(str(tmp_path)), model.lm_head.weight.detach())


def test_a_checkpoint_that_is_no_safetensors_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    expected = tensors["lm_head.weight"]
    assert torch.equal(read_output_embedding(str(tmp_path)), expected)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"model .*nowhere: cannot be loaded"):
        read_output_embedding(str(tmp_path / "nowhere"))
