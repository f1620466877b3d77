"""``vllm-steer convert``: converts the files of other tools and summarises them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner
from untrusted_text_tools import (
    DECODER,
    SIGNED,
    directions,
    write_concept,
    write_gguf,
    write_npz,
    write_svec,
)

from vllm_steer import SteerError, load_steer, save_steer
from vllm_steer.cli import app
from vllm_steer.models import load_language_model


def convert(*arguments: Any) -> Any:
    """Run the command in this process; raise its ``SteerError``."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if isinstance(result.exception, SteerError):
        raise result.exception
    return result


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process."""
    run = "from vllm_steer.cli import main; main()"
    line = [sys.executable, "-c", run, "convert", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_a_converted_file_is_the_steer_that_was_read(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "v.gguf", directions([1, 2, 3]))
    result = convert(source, tmp_path / "own.safetensors", "--layers", "2-3")
    assert result.exit_code == 0
    original, converted = load_steer(tmp_path / "own.safetensors"), load_steer(source, layers="2-3")
    assert (original.layers, original.site, original.mode, original.base_model) == (
        (2, 3),
        "resid",
        "add",
        "mistral",
    )
    assert torch.equal(original.vectors, converted.vectors)
    with safe_open(str(tmp_path / "own.safetensors"), framework="pt") as file:
        assert file.metadata()["format"] == "vllm-steer"


def test_the_table_describes_the_file(tmp_path: Path) -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    original = write_concept(tmp_path / "w", W=rows, b=torch.zeros(3))
    output = convert(original, tmp_path / "own", "--default-strength", "8").output
    output_value = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in output.splitlines()
        if line.startswith("│")
    ]
    assert output_value == [
        ["format", "a concept-guidance file"],
        ["kind", "vector"],
        ["site", "attn_in"],
        ["hidden size", "2"],
        ["default strength", "8.0"],
        ["mode", "rotate"],
        ["layers", "0-2"],
        ["norm per layer", "1 to 10"],
    ]


def test_json_describes_the_file(tmp_path: Path) -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    original = write_concept(tmp_path / "w", W=rows, b=torch.zeros(2))
    result = convert(original, tmp_path / "own", "--json", "--mode", "add", "--site", "resid")
    assert json.loads(result.output) == {
        "format": "a concept-guidance file",
        "kind": "vector",
        "site": "resid",
        "hidden_size": 2,
        "default_strength": None,
        "base_model": "",
        "description": "",
        "mode": "add",
        "layers": "0-1",
        "norms": {"0": 5.0, "1": 1.0},
        "output": str(tmp_path / "own"),
    }


def test_a_delta_is_described_by_the_largest_step_of_each_layer(tmp_path: Path) -> None:
    delta = torch.zeros(2, 2, 1, 2)  # steps, layers, heads, d_head
    delta[0, 0, 0], delta[1, 0, 0] = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    delta[1, 1, 0] = torch.tensor([0.0, 2.0])
    torch.save(delta, tmp_path / "diff.pt")
    result = convert(tmp_path / "diff.pt", tmp_path / "own", "--json", "--schedule", "dim")
    output = json.loads(result.output)
    assert (output["kind"], output["site"], output["schedule"]) == ("delta", "heads", "dim")
    assert (output["steps"], output["norms"]) == (2, {"0": 5.0, "1": 2.0})
    assert load_steer(tmp_path / "own").schedule == "dim"


def test_an_lm_steer_is_described_by_its_columns_and_rank(tmp_path: Path, make_steer: Any) -> None:
    tensors = make_steer(columns=2, rank=3).tensors
    torch.save([None, dict(tensors), 10], tmp_path / "moved.pt")
    result = convert(
        *(tmp_path / "moved.pt", tmp_path / "own", "--json"),
        *("--epsilon", "0.001", "--fixed-columns", "1", "--base-model", "gpt2"),
        *("--description", "detox", "--default-strength", "0"),
    )
    assert json.loads(result.output) == {
        "format": "an LM-Steer checkpoint",
        "kind": "lm_steer",
        "site": "head",
        "hidden_size": 6,
        "default_strength": 0.0,
        "base_model": "gpt2",
        "description": "detox",
        "variant": "multiply",
        "epsilon": 0.001,
        "columns": 2,
        "fixed_columns": [1],
        "rank": 3,
        "output": str(tmp_path / "own"),
    }
    assert load_steer(tmp_path / "own").fixed_columns == (1,)
    columns_kept = convert(tmp_path / "own", tmp_path / "kept", "--columns", "0", "--json")
    assert json.loads(columns_kept.output)["columns"] == 1


def test_every_option_of_a_format_reaches_its_reader(tmp_path: Path) -> None:
    sae = write_npz(tmp_path / "sae.npz")
    convert(sae, tmp_path / "a", "--feature", "0", "--hook", "blocks.3.hook_resid_pre")
    first = load_steer(tmp_path / "a")
    assert (first.layers, first.vectors[0].tolist()) == ((2,), DECODER[0].tolist())
    concept = write_concept(tmp_path / "w", W=torch.ones(4, 6), a=SIGNED)
    convert(concept, tmp_path / "b", "--orient", "--kind", "vector", "--hidden-size", "6")
    assert load_steer(tmp_path / "b").vectors[:, 0].tolist() == [1, -1, 1, -1]
    torch.save(torch.arange(12.0).view(4, 3), tmp_path / "persona.pt")
    convert(tmp_path / "persona.pt", tmp_path / "c", "--rows", "1-3", "--layers", "0-2")
    assert load_steer(tmp_path / "c").vectors[0].tolist() == [3, 4, 5]


def test_an_existing_output_is_only_replaced_when_forced(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "v.gguf", directions([1]))
    output = tmp_path / "own"
    output.write_text("precious")
    with pytest.raises(SteerError, match=r"own: exists already; choose another name, or give --fo"):
        convert(original, output)
    assert output.read_text() == "precious"
    assert convert(original, output, "--force").exit_code == 0
    assert load_steer(output).layers == (1,)


def test_a_file_can_replace_itself(tmp_path: Path) -> None:
    path = tmp_path / "own"
    steer = load_steer(write_gguf(tmp_path / "v.gguf", directions([1, 2])))
    save_steer(steer, path)
    convert(path, path, "--force", "--layers", "2")
    assert torch.equal(load_steer(path).vectors, steer.vectors[1:])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["own", "v.gguf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "9"], r"v\.gguf: layers 9 are not in this steer; it has 1-2"),
        (["--kind", "magic"], "kind is 'magic'"),
        (["--feature", "3"], "feature does not apply to a GGUF control vector; remove the key"),
        (["--orient"], "orient does not apply to a GGUF control vector; remove the key"),
        (["--default-strength", "nan"], "default_strength is nan"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_refused_file_leaves_no_output(tmp_path: Path, options: list[str], message: str) -> None:
    original = write_gguf(tmp_path / "v.gguf", directions([1, 2]))
    with pytest.raises(SteerError, match=message):
        convert(original, tmp_path / "own", *options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["v.gguf"]


@pytest.mark.parametrize("output", ["no/such/folder/own", "v.gguf/own", "o" * 300])
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, output: str) -> None:
    original = write_gguf(tmp_path / "v.gguf", directions([1]))
    message = rf"{output[:200]}.*: (cannot be written \(|there is no folder )"
    with pytest.raises(SteerError, match=message):
        convert(original, tmp_path / output)


def test_the_command_returns_0_and_writes(tmp_path: Path) -> None:
    original = write_svec(tmp_path / "v.svec", directions([5]))
    completed = command(original, tmp_path / "own", "--json")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert json.loads(completed.stdout)["layers"] == "4"
    assert load_steer(tmp_path / "own").layers == (4,)


def test_the_command_returns_1_and_prints_one_line(tmp_path: Path) -> None:
    torch.save(torch.ones(33, 4), tmp_path / "persona.pt")
    completed = command(tmp_path / "persona.pt", tmp_path / "own")
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.startswith(
        f"vllm-steer: {tmp_path / 'persona.pt'}: a tensor [33, 4] does"
    )
    assert "give rows: 1-32, layers: 0-31" in completed.stderr
    assert completed.stderr.count("\n") == 1
    assert not (tmp_path / "own").exists()


def activation_norms(layer: int, texts: list[str]) -> list[float]:
    """The lengths of the embedded model's residual stream behind a layer, but of first tokens."""
    small, norms = load_language_model("embedded"), []
    for text in texts:
        ids = small.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            seen: list[torch.Tensor] = []
            block = small.model.model.layers[layer]
            handle = block.register_forward_hook(
                lambda _m, _a, out, seen=seen: seen.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            small.model(ids)
            handle.remove()
        norms += [float(row.norm()) for row in seen[0][0, 1:]]
    return sorted(norms)


def test_a_model_says_what_share_of_its_activations_the_steer_changes(tmp_path: Path) -> None:
    vectors = torch.zeros(2, 128)
    vectors[0, 0], vectors[1, :2] = 7.0, torch.tensor([3.0, 4.0])
    torch.save(vectors, tmp_path / "v.pt")
    texts = ["The hotel was wonderful.", "A scandal!"]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    line = (tmp_path / "v.pt", tmp_path / "own", "--layers", "0,2", "--model", "embedded")
    options = ("--texts", tmp_path / "t.txt")
    size = json.loads(convert(*line, *options, "--json").output)["relative_size"]
    shares = []
    for layer, length in ((0, 7.0), (2, 5.0)):
        norms = activation_norms(layer, texts)
        one = size["layers"][str(layer)]
        assert one["activation"] == pytest.approx(norms[(len(norms) - 1) // 2], rel=1e-4)
        assert one["change"] == pytest.approx(length, rel=1e-6)
        inverse = sorted(length / norm for norm in norms)
        assert one["share"] == pytest.approx(inverse[(len(norms) - 1) // 2], rel=1e-4)
        shares.append(one["share"])
    half = 0.5 / (sum(shares) / 2)
    assert size["strength_for_share"]["0.5"] == pytest.approx(half)
    table = convert(*line, *options, "--force").output
    assert "|v w|/|h|" in table and f"0.5 at strength {half:.3g}" in table
    without = convert(*line[:4], "--force").output
    assert "--model NAME prints |v w|/|h| of each layer" in without


def test_a_model_that_cannot_measure_the_steer_is_refused(tmp_path: Path, make_steer: Any) -> None:
    source = write_gguf(tmp_path / "v.gguf", directions([1]))
    save_steer(make_steer(), tmp_path / "lm")
    for line, message in (
        ((source, "--model", "embedded"), r"the steer is \d+ wide, and the site resid .* is 128"),
        ((source, "--texts", "t.txt"), "texts are read by a model; give --model too"),
        ((tmp_path / "lm", "--model", "embedded"), "not apply to a steer of kind lm_steer"),
    ):
        with pytest.raises(SteerError, match=message):
            convert(line[0], tmp_path / "own", *line[1:])
        assert not (tmp_path / "own").exists()
