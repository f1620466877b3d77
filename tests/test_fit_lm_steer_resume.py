"""An interrupted fit continues with identical results, or loses nothing, for every kind of
interruption.
"""

import csv
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_steer import SteerError, load_steer
from vllm_steer.embedded import MODEL, corpus
from vllm_steer.files.atomic_write import unfinished_name
from vllm_steer.fit import fit_lm_steer, training_run
from vllm_steer.fit.lm_steer_settings import FitCallbacks

STEPS = 12
SAMPLES = corpus.generate(40, seed=1)
TEXTS = [sample.text for sample in SAMPLES]
LABELS = [1.0 if sample.sentiment == "positive" else -1.0 for sample in SAMPLES]
SETTINGS: dict[str, Any] = {
    "rank": 3,
    "epsilon": 0.3,
    "steps": STEPS,
    "batch_size": 6,
    "max_length": 24,
    "checkpoint_every": 4,
}


class Ended(BaseException):
    """Simulates the end of a process."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def fit(model: Any, tokenizer: Any, folder: Path | None, **options: Any) -> Any:
    return fit_lm_steer(
        model, tokenizer, TEXTS, LABELS, **{**SETTINGS, **options}, run_folder=folder
    )


def end_at(step: int) -> FitCallbacks:
    def on_step(process: int, _loss: float) -> None:
        if process == step:
            raise Ended

    return FitCallbacks(on_step=on_step)


def checkpoint_step(folder: Path) -> int:
    with safe_open(str(folder / "checkpoint.safetensors"), framework="pt") as file:
        return int(file.metadata()["step"])


def curve(folder: Path) -> list[tuple[int, float]]:
    with (folder / "loss.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def assert_same(first: Any, second: Any) -> None:
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name])
    assert first.recipe == second.recipe


@pytest.mark.parametrize("variant", ["multiply", "add", "offset"])
@pytest.mark.parametrize("ended", [0, 5, 7, STEPS - 1])
def test_an_interrupted_fit_continues_bit_for_bit(
    model: Any, tokenizer: Any, tmp_path: Path, ended: int, variant: str
) -> None:
    whole = fit(model, tokenizer, tmp_path / "whole", variant=variant)
    with pytest.raises(Ended):
        fit(model, tokenizer, tmp_path / "run", variant=variant, callbacks=end_at(ended))
    assert checkpoint_step(tmp_path / "run") == ended // 4 * 4
    steps: list[int] = []
    callbacks = FitCallbacks(on_step=lambda step, _: steps.append(step))
    assert_same(
        whole, fit(model, tokenizer, tmp_path / "run", variant=variant, callbacks=callbacks)
    )
    assert steps == list(range(ended // 4 * 4, STEPS))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert_same(whole, fit(model, tokenizer, None, variant=variant))


def test_a_continued_fit_reports_it_and_reads_no_text_again(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(Ended):
        fit(model, tokenizer, tmp_path, callbacks=end_at(9))
    messages: list[str] = []
    read: list[int] = []
    callbacks = FitCallbacks(
        on_message=messages.append, on_text=lambda process, _: read.append(process)
    )
    fit(model, tokenizer, tmp_path, callbacks=callbacks)
    assert messages == ["going on after step 8 of 12"]
    assert read == []


def test_a_fit_that_was_interrupted_while_reading_texts_reads_them_again(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    def on_text(process: int, _total: int) -> None:
        if process == 5:
            raise Ended

    with pytest.raises(Ended):
        fit(model, tokenizer, tmp_path, callbacks=FitCallbacks(on_text=on_text))
    assert not (tmp_path / "hidden_states.bin").exists()
    assert_same(fit(model, tokenizer, None), fit(model, tokenizer, tmp_path))


def test_the_unfinished_file_of_a_killed_process_is_removed(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / unfinished_name("hidden_states.bin")).write_text("many gigabytes")
    (tmp_path / "hidden_states.bin.unfinished").write_text("the user's own")
    fit(model, tokenizer, tmp_path, cache_bytes=0)
    assert [p.name for p in tmp_path.glob("*.unfinished")] == ["hidden_states.bin.unfinished"]


def test_a_finished_run_keeps_the_loss_curve_only(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    fit(model, tokenizer, tmp_path)
    training_run.finish_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.csv"]
    assert [step for step, _ in curve(tmp_path)] == list(range(STEPS))


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (
            {"learning_rate": 0.5},
            "other settings: learning_rate was 0.01 and is now 0.5; give the same",
        ),
        ({"seed": 3, "rank": 4}, "rank was 3 and is now 4; seed was 0 and is now 3; give"),
        ({"cache_bytes": 0}, "cached was True and is now False"),
    ],
)
def test_other_settings_are_refused_by_name(
    model: Any, tokenizer: Any, tmp_path: Path, options: dict[str, Any], difference: str
) -> None:
    with pytest.raises(Ended):
        fit(model, tokenizer, tmp_path, callbacks=end_at(5))
    with pytest.raises(SteerError, match=difference):
        fit(model, tokenizer, tmp_path, **options)
    assert_same(fit(model, tokenizer, None), fit(model, tokenizer, tmp_path))


def test_other_texts_and_another_model_are_refused(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(Ended):
        fit(model, tokenizer, tmp_path, callbacks=end_at(5))
    labels = [-label for label in LABELS]
    with pytest.raises(SteerError, match="with other settings: different texts; give"):
        fit_lm_steer(model, tokenizer, TEXTS, labels, **SETTINGS, run_folder=tmp_path)
    torch.manual_seed(1)
    another = LlamaForCausalLM(model.config).eval()
    with pytest.raises(SteerError, match="with other settings: different model; give"):
        fit(another, tokenizer, tmp_path)


def test_restart_discards_the_unfinished_run(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(Ended):
        fit(model, tokenizer, tmp_path, seed=7, callbacks=end_at(5))
    fitted = fit(model, tokenizer, tmp_path, restart=True)
    assert_same(fit(model, tokenizer, None), fitted)
    assert len(curve(tmp_path)) == STEPS


def test_a_broken_checkpoint_is_an_error_that_names_it(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(SteerError, match=r"checkpoint.safetensors: cannot be read .* --restart"):
        fit(model, tokenizer, tmp_path)


def test_a_nan_loss_keeps_the_last_checkpoint(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_steer.fit import lm_steer_training

    real = lm_steer_training.loss_and_gradients
    calls: list[int] = []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        loss, gradients = real(*arguments, **options)
        return (float("nan") if len(calls) == 7 else loss), gradients

    monkeypatch.setattr(lm_steer_training, "loss_and_gradients", broken)
    with pytest.raises(SteerError, match="step 6: the loss is nan; training stopped"):
        fit(model, tokenizer, tmp_path)
    assert checkpoint_step(tmp_path) == 4


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, a write beyond it fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_for_the_hidden_states_is_an_error(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    too_large = os.strerror(errno.EFBIG)
    expected = f"hidden_states.bin: cannot be written .*{too_large}"
    with files_of_at_most(20_000), pytest.raises(SteerError, match=expected):
        fit(model, tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.safetensors",
        "loss.csv",
    ]


def test_a_full_disk_for_a_checkpoint_keeps_the_last_one(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    limits = files_of_at_most(100)

    def on_step(step: int, _loss: float) -> None:
        if step == 5:
            limits.__enter__()

    with pytest.raises(SteerError, match=r"(loss.csv|checkpoint.safetensors): cannot be written"):
        try:
            fit(model, tokenizer, tmp_path, callbacks=FitCallbacks(on_step=on_step))
        finally:
            limits.__exit__(None, None, None)
    assert checkpoint_step(tmp_path) == 4
    assert_same(fit(model, tokenizer, None), fit(model, tokenizer, tmp_path))


def test_a_run_folder_that_cannot_be_made_is_an_error(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SteerError, match=r"run folder .*file: cannot be used"):
        fit(model, tokenizer, tmp_path / "file")


def command(output: Path, data: Path, *options: str) -> list[str]:
    run = "from vllm_steer.cli import main; main()"
    return [
        *(sys.executable, "-c", run, "fit", "lm-steer", "embedded", str(output)),
        *("--data", str(data), "--label-field", "sentiment"),
        *("--labels", "positive=1,negative=-1", "--rank", "4", "--epsilon", "0.01"),
        *("--steps", "150", "--batch-size", "8", "--checkpoint-every", "10", *options),
    ]


@pytest.mark.matrix
def test_a_killed_command_leaves_the_old_steer_and_continues_bit_for_bit(tmp_path: Path) -> None:
    data, output = tmp_path / "reviews.csv", tmp_path / "steer.safetensors"
    rows = "".join(f'"{s.text}",{s.sentiment}\n' for s in SAMPLES)
    data.write_text("text,sentiment\n" + rows, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = tmp_path / "whole.safetensors"
    subprocess.run(command(whole, data), env=environment, check=True, capture_output=True)
    output.write_bytes(b"the steer that was there")

    line = command(output, data, "--force")
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE) as process:
        folder = tmp_path / "steer.safetensors.run"
        while process.poll() is None and not _has_a_checkpoint(folder):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert output.read_bytes() == b"the steer that was there"
    killed_at = checkpoint_step(folder)
    assert 0 < killed_at < 150

    completed = subprocess.run(line, env=environment, check=True, capture_output=True, text=True)
    assert f"going on after step {killed_at} of 150" in completed.stderr
    assert_same(load_steer(whole), load_steer(output))
    assert curve(folder) == curve(tmp_path / "whole.safetensors.run")
    assert [path.name for path in folder.iterdir()] == ["loss.csv"]


def _has_a_checkpoint(folder: Path) -> bool:
    return (folder / "loss.csv").exists() and len(curve(folder)) >= 20
