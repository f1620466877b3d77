"""Loading Hugging Face models for fitting and judging."""

from pathlib import Path

import pytest
import torch

from vllm_steer import SteerError, embedded
from vllm_steer.hf.language_model import last_logits_only
from vllm_steer.models import load_language_model, model_path


def test_the_embedded_model_is_found_by_its_name() -> None:
    assert model_path("embedded") == str(embedded.MODEL)
    assert model_path("gpt2") == "gpt2"


def test_a_loaded_model_is_frozen_and_in_evaluation_mode() -> None:
    loaded = load_language_model("embedded")
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.name == "embedded"
    assert loaded.tokenizer.decode(loaded.tokenizer("hotel")["input_ids"]) == "<s>hotel"


def test_the_model_has_the_requested_dtype() -> None:
    assert load_language_model("embedded", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("fault", ["missing", "empty", "no-weights"])
def test_a_model_that_cannot_be_loaded_gives_one_line(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / fault
    if fault != "missing":
        folder.mkdir()
    if fault == "no-weights":
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((embedded.MODEL / name).read_bytes())
    with pytest.raises(SteerError, match=rf"^model .*{fault}: ") as error:
        load_language_model(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "cpu:x"])
def test_a_missing_device_gives_one_line(device: str) -> None:
    with pytest.raises(SteerError, match=rf"^device {device}: cannot be used") as error:
        load_language_model("embedded", device=device)
    assert "\n" not in str(error.value)


def test_an_unknown_dtype_gives_one_line() -> None:
    with pytest.raises(SteerError, match="float33"):
        load_language_model("embedded", dtype="float33")


def test_a_model_computes_the_last_position_s_logits_alone_where_it_can() -> None:
    model = load_language_model("embedded").model
    tokens = torch.tensor([[5, 6, 7]])
    whole = model(input_ids=tokens).logits
    last = model(input_ids=tokens, **last_logits_only(model)).logits
    assert last.shape == (1, 1, whole.shape[-1])
    assert torch.allclose(last[:, 0], whole[:, -1], atol=1e-5)


def test_a_model_without_such_an_argument_computes_all() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    assert last_logits_only(Plain()) == {}
