"""The plugin's part of vLLM's command line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_steer import environment, save_steer


@pytest.fixture
def parse(tmp_path: Path, make_steer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """vLLM's own ``serve`` parser with the plugin loaded."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    monkeypatch.setenv(environment.ACTIVE, "")
    save_steer(make_steer(), tmp_path / "a.safetensors")
    (tmp_path / "steers.yaml").write_text(
        "steers: {a: {path: a.safetensors}}\npresets: {p: {a: 1}, o: {a: 2}}\n"
    )

    def parse(*options: str) -> Any:
        arguments = [option.replace("STEERS", str(tmp_path / "steers.yaml")) for option in options]
        return make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)

    return parse


MIDDLEWARE = "vllm_steer.serving.http.SteerMiddleware"


@pytest.mark.parametrize(
    "options",
    [
        ["model", "--steer-config", "STEERS", "--additional-config", '{"x": 1}'],
        ["--additional-config", '{"x": 1}', "--steer-config=STEERS", "model"],
        ["--steer-config=STEERS", "--additional-config.x", "1", "model"],
        ["--steer_config=STEERS", "--additional_config", '{"x": 1}', "--model", "model"],
    ],
    ids=["flag-first", "flag-last", "dotted", "underscores"],
)
def test_the_flag_merges_with_additional_config_in_any_order(
    parse: Any, tmp_path: Path, options: list[str]
) -> None:
    args = parse(*options)
    assert args.additional_config == {"x": 1, "steer": str(tmp_path / "steers.yaml")}
    assert args.middleware == [MIDDLEWARE]
    assert args.served_model_name == ["model", "model:o", "model:p"]


def test_without_the_flag_the_parsed_arguments_are_stock(parse: Any) -> None:
    args = parse("model", "--additional-config", '{"x": 1}')
    assert args.additional_config == {"x": 1}
    assert args.middleware == []
    assert args.served_model_name is None


def test_a_steer_in_additional_config_is_served_like_the_flag(parse: Any) -> None:
    args = parse("model", "--additional-config", '{"steer": "STEERS"}')
    assert args.middleware == [MIDDLEWARE]
    assert args.served_model_name == ["model", "model:o", "model:p"]


def test_every_served_name_gets_every_preset_once(parse: Any) -> None:
    args = parse("model", "--steer-config=STEERS", "--served-model-name", "x", "y", "x:p")
    names = args.served_model_name
    assert names[0] == "x"
    assert {"x", "y", "x:o", "x:p", "y:o", "y:p"} <= set(names)
    assert len(names) == len(set(names))


def test_other_middleware_is_kept(parse: Any) -> None:
    args = parse("model", "--middleware", "mine.Own", "--steer-config=STEERS")
    assert args.middleware == ["mine.Own", MIDDLEWARE]


def test_a_parser_used_twice_gives_the_same(parse: Any) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    first = parse("model", "--steer-config=STEERS")
    parser = make_arg_parser(FlexibleArgumentParser())
    for _ in range(2):
        source = first.additional_config["steer"]
        args = parser.parse_args(["model", f"--steer-config={source}"])
        assert args.served_model_name == first.served_model_name
        assert args.middleware == first.middleware


def test_later_processes_of_vllm_get_the_steer_config(parse: Any) -> None:
    """A fork server, whose children have its environment, is started soon after."""
    parse("model")
    assert os.environ[environment.ACTIVE] == ""
    parse("model", "--steer-config=STEERS")
    assert os.environ[environment.ACTIVE] == "steering,reports,streams"


@pytest.mark.parametrize("value", ["1", "2", " 1"])
def test_the_rust_frontend_is_refused_for_a_steered_server(
    parse: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    assert parse("model").additional_config == {}
    with pytest.raises(SystemExit):
        parse("model", "--steer-config=STEERS")
    assert "unset VLLM_USE_RUST_FRONTEND, or serve without a steer config" in (
        capsys.readouterr().err
    )
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    assert parse("model", "--steer-config=STEERS").middleware == [MIDDLEWARE]
