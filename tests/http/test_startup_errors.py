"""A steer config that cannot be served stops the start; the error names the file, the value and the
reason.

Most cases go through vLLM's own ``serve`` parser and engine configuration in this process; two
through a real ``vllm serve``.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from vllm_steer import LMSteer, SteerError, embedded, save_steer

HIDDEN = json.loads((embedded.MODEL / "config.json").read_text())["hidden_size"]
A = {"steers": {"a": {"path": "a.safetensors"}}}


def vector(hidden_size: int) -> LMSteer:
    return LMSteer(
        variant="add", add=torch.ones(1, hidden_size), epsilon=1.0, hidden_size=hidden_size
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A steer that fits the embedded model, and three unusable files."""
    save_steer(vector(HIDDEN), tmp_path / "a.safetensors")
    save_steer(vector(HIDDEN + 1), tmp_path / "wide.safetensors")
    projector = torch.ones(1, HIDDEN, 20)
    ranked = LMSteer(
        variant="multiply",
        projector1=projector,
        projector2=projector.clone(),
        epsilon=1.0,
        hidden_size=HIDDEN,
    )
    save_steer(ranked, tmp_path / "ranked.safetensors")
    metadata = {
        "format": "vllm-steer",
        "format_version": "1",
        "kind": "lm_steer",
        "hidden_size": str(HIDDEN),
        "epsilon": "1",
    }
    nan = torch.full((1, HIDDEN), torch.nan)
    save_file({"add": nan}, str(tmp_path / "nan.safetensors"), metadata=metadata)
    (tmp_path / "text.safetensors").write_text("not a steer")
    (tmp_path / "calls.pt").write_bytes(pickled_call(tmp_path / "executed"))
    return tmp_path


def pickled_call(marker: Path) -> bytes:
    """A checkpoint that would run a command if it were unpickled."""

    class Call:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    file = io.BytesIO()
    torch.save([None, {"add_vec": Call()}, 1], file)
    return file.getvalue()


def alias_bomb() -> str:
    """A config of 3 kB with a description that expands to 2**60 words."""
    lines = ["x0: &x0 [lol, lol]"]
    lines += [f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 60)]
    return "\n".join([*lines, "steers: {a: {path: a.safetensors, description: *x59}}", ""])


@pytest.fixture
def parse() -> Callable[..., Any]:
    """Process arguments as ``vllm serve`` does before it starts anything."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    return lambda *options: make_arg_parser(FlexibleArgumentParser()).parse_args(
        [str(embedded.MODEL), "--dtype=float32", "--max-model-len=256", "--enforce-eager", *options]
    )


def create_engine_config(arguments: Any) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments.model = arguments.model_tag
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()


def written(folder: Path, config: Any) -> Path:
    path = folder / "steers.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


def test_a_config_that_fits_reaches_the_engine_configuration(parse: Any, folder: Path) -> None:
    from vllm_steer.serving.plan_transport import plan_of

    config = create_engine_config(parse(f"--steer-config={written(folder, A)}"))
    plan = plan_of(config)
    assert plan is not None
    assert plan.steers["a"].path == folder / "a.safetensors"


AT_PARSING: dict[str, tuple[Any, str]] = {
    "bad-yaml": ("steers: [", r"steers\.yaml is neither YAML nor JSON"),
    "empty": ("", r"steers\.yaml is not a mapping; expected at least the key 'steers'"),
    "unknown-key": ({**A, "colour": "red"}, r"steers\.yaml: unknown key 'colour'"),
    "no-steers": ({"presets": {}}, r"steers\.yaml: key 'steers' is missing"),
    "too-many-steers": (
        {
            "steers": {n: {"path": "a.safetensors"} for n in "abc"},
            "limits": {"max_steers": 2},
        },
        r"steers\.yaml.*3 steers are configured; limits\.max_steers is 2",
    ),
    "preset-of-an-unknown-steer": (
        {**A, "presets": {"p": {"b": 1}}},
        r"steers\.yaml.*preset p names b; steers: a",
    ),
    "bad-limit": ({**A, "limits": {"max_rank": 0}}, r"steers\.yaml: limits\.max_rank is 0"),
    "alias-bomb": (alias_bomb(), r"steers\.yaml: line 16: more than 100000 values"),
    "key-twice": (
        "steers: {a: {path: a.safetensors}}\nsteers: {b: {path: a.safetensors}}\n",
        r"steers\.yaml: line 2: the key 'steers' is given twice",
    ),
    "escape-sequence": (
        'steers: {a: {path: a.safetensors, "\\e[31m": 1}}\n',
        r"steers\.yaml: unknown key .*x1b\[31m",
    ),
}


@pytest.mark.parametrize("case", AT_PARSING)
def test_a_wrong_config_stops_the_parser_with_a_usage_error(
    parse: Any, folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    config, message = AT_PARSING[case]
    with pytest.raises(SystemExit) as caught:
        parse(f"--steer-config={written(folder, config)}")
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert "Traceback" not in printed


def test_a_missing_config_file_stops_the_parser(
    parse: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(f"--steer-config={folder / 'gone.yaml'}")
    assert f"steer config {folder / 'gone.yaml'}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("flag_first", [True, False])
def test_a_config_given_twice_stops_the_parser(
    parse: Any, folder: Path, capsys: pytest.CaptureFixture[str], flag_first: bool
) -> None:
    path = written(folder, A)
    options = [f"--steer-config={path}", "--additional-config=" + json.dumps({"steer": str(path)})]
    with pytest.raises(SystemExit):
        parse(*(options if flag_first else reversed(options)))
    message = "--steer-config and additional_config['steer'] are both given; give one"
    assert message in capsys.readouterr().err


def steer(name: str, **limits: Any) -> dict[str, Any]:
    return {"steers": {"x": {"path": name}}, "limits": limits}


AT_CONFIGURATION: dict[str, tuple[Any, str]] = {
    "missing-file": (steer("gone.pt"), r"steer x: .*/gone\.pt: does not exist; give the path"),
    "no-steer-file": (
        steer("text.safetensors"),
        r"steer x: .*/text\.safetensors: neither a safetensors file nor a PyTorch \(\.pt\)",
    ),
    "wrong-hidden-size": (
        steer("wide.safetensors"),
        rf"steer x: .*/wide\.safetensors: hidden size is {HIDDEN + 1}; the model .* has {HIDDEN}",
    ),
    "nan": (
        steer("nan.safetensors"),
        rf"steer x: .*/nan\.safetensors: tensor add has {HIDDEN} values that are NaN",
    ),
    "rank-above-the-limit": (
        steer("ranked.safetensors", max_rank=19),
        r"steer x: .*/ranked\.safetensors: rank is 20; limits\.max_rank is 19",
    ),
    "unknown-default": (
        {**A, "default": "happy"},
        r"default: steer 'happy' is unknown; steers: a",
    ),
    "default-above-the-limit": (
        {**A, "default": "a:9", "limits": {"max_strength": 8}},
        r"default: steer a has strength 9; allowed: -8 to 8",
    ),
    "code": (
        steer("calls.pt"),
        r"steer x: .*/calls\.pt: refused: its pickle refers to posix\.system",
    ),
    "preset-above-the-limit": (
        {**A, "presets": {"p": {"a": -9}}, "limits": {"max_strength": 8}},
        r"preset p: steer a has strength -9; allowed: -8 to 8",
    ),
}


@pytest.mark.parametrize("case", AT_CONFIGURATION)
def test_a_steer_that_cannot_be_served_stops_the_engine(
    parse: Any, folder: Path, case: str
) -> None:
    config, message = AT_CONFIGURATION[case]
    arguments = parse(f"--steer-config={written(folder, config)}")
    with pytest.raises(SteerError, match=message):
        create_engine_config(arguments)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("case", ["missing-file", "wrong-hidden-size"])
def test_an_additional_config_is_refused_with_the_same_message(folder: Path, case: str) -> None:
    from vllm import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config, message = AT_CONFIGURATION[case]
    arguments = EngineArgs(
        str(embedded.MODEL),
        dtype="float32",
        max_model_len=256,
        additional_config={"steer": str(written(folder, config))},
    )
    with pytest.raises(SteerError, match=message):
        arguments.create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "pooling", "convert": "embed"}, "pooling models; a steer changes generated"),
        ({"kv_sharing_fast_prefill": True}, "KV-sharing fast prefill; leave kv_sharing_fast_pre"),
    ],
    ids=["pooling", "fast-prefill"],
)
def test_an_unsupported_feature_stops_a_real_engine_configuration(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    from vllm import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    arguments = EngineArgs(
        str(embedded.MODEL),
        dtype="float32",
        max_model_len=256,
        additional_config={"steer": str(written(folder, A))},
        **options,
    )
    with pytest.raises(SteerError, match=message):
        arguments.create_engine_config()


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Callable[[Path], tuple[int, str]]:
    """Run a real ``vllm serve`` that is expected to stop; returns its exit code and output."""

    def run(config: Path) -> tuple[int, str]:
        outer = {name: value for name, value in os.environ.items() if name != "VLLM_STEER_ACTIVE"}
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm.entrypoints.cli.main",
                "serve",
                str(embedded.MODEL),
                "--port=0",
                "--enforce-eager",
                "--max-model-len=256",
                f"--steer-config={config}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**outer, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=180)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode, output

    return run


@pytest.mark.parametrize(
    "case",
    [
        "wrong-hidden-size",
        *(pytest.param(c, marks=pytest.mark.matrix) for c in ("unknown-key", "alias-bomb", "code")),
    ],
)
def test_a_real_server_ends_with_an_error_code_and_the_message(
    serve: Any, folder: Path, case: str
) -> None:
    config, message = {**AT_PARSING, **AT_CONFIGURATION}[case]
    code, output = serve(written(folder, config))
    assert code != 0
    assert re.search(message, output), output[-3000:]
    assert not (folder / "executed").exists()
