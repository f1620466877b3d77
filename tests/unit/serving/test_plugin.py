"""What the plugin changes in vLLM, and when.

Facts about global state are gathered in processes of their own (all started at once, each prints
one JSON object).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vllm_steer import LMSteer, save_steer

SNAPSHOT = """
import json, os, sys, types
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.worker.worker_base import WorkerWrapperBase

def attributes():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or not module_name.startswith("vllm."):
            continue
        for name, value in list(vars(module).items()):
            if name.startswith("__"):
                continue
            if not isinstance(value, type):
                found[f"{module_name}.{name}"] = value
            elif value.__module__ == module_name:
                for member, inner in list(vars(value).items()):
                    found[f"{module_name}.{value.__qualname__}.{member}"] = inner
    return found

KINDS = (types.FunctionType, staticmethod, classmethod, property, type)

def changed(before):
    after = attributes()
    return sorted(
        name for name, value in before.items()
        if issubclass(type(value), KINDS) and after.get(name) is not value
    )

def wraps(function):
    count = 0
    while hasattr(function, "__wrapped__"):
        function, count = function.__wrapped__, count + 1
    return count
"""
REGISTER = (
    SNAPSHOT
    + """
environment = dict(os.environ)
before = attributes()
load_general_plugins()
first = changed(before)
from vllm_steer.plugin import register
register()
register()
overrides = {
    "changed": first,
    "changed_after_more": changed(before),
    "wraps": {n: wraps(getattr(EngineArgs, n)) for n in ("add_cli_args", "create_engine_config")},
    "environment": {k: v for k, v in os.environ.items() if environment.get(k) != v},
}
MODEL, STEERS = sys.argv[1], sys.argv[2:]
def config(additional):
    return EngineArgs(
        MODEL, skip_tokenizer_init=True, max_model_len=64, additional_config=additional
    )
plain = config({}).create_engine_config()
stock = EngineArgs.create_engine_config.__wrapped__(config({}))
overrides["hashes"] = {"plain": plain.compute_hash(), "stock": stock.compute_hash()}
overrides["changed_by_a_plain_engine"] = changed(before)
from vllm_steer.serving.plan_transport import plan_of
overrides["plain_plan"] = plan_of(plain) is None
for path in STEERS:
    args = config({"steer": {"steers": {"a": {"path": path}}}, "other": {"kept": 1}})
    given = json.dumps(args.additional_config)
    steered = args.create_engine_config()
    overrides["hashes"][path] = steered.compute_hash()
    overrides["hashes"][path + " again"] = args.create_engine_config().compute_hash()
    overrides["other"] = steered.additional_config["other"]
    overrides["args_unchanged"] = json.dumps(args.additional_config) == given
overrides["changed_by_a_steered_engine"] = changed(before)
args = config({"steer": {"steers": {"a": {"path": "gone"}}}})
try:
    args.create_engine_config()
except ValueError as error:
    overrides["refused"] = str(error)
print(json.dumps(overrides))
"""
)
DISABLED = (
    SNAPSHOT
    + """
before = attributes()
load_general_plugins()
from vllm_steer.plugin import register
register()
print(json.dumps({"changed": changed(before)}))
"""
)
FIRST = [
    "vllm.engine.arg_utils.EngineArgs.add_cli_args",
    "vllm.engine.arg_utils.EngineArgs.create_engine_config",
]
EXTRA_KEYS = "generate_block_hash_extra_keys"
ALL = sorted(
    [
        *FIRST,
        f"vllm.v1.core.block_pool.{EXTRA_KEYS}",
        f"vllm.v1.core.kv_cache_utils.{EXTRA_KEYS}",
        "vllm.v1.engine.core.EngineCore.add_request",
        "vllm.v1.engine.core.EngineCore.preprocess_add_request",
        "vllm.v1.engine.input_processor.InputProcessor._validate_params",
        "vllm.v1.engine.output_processor.OutputProcessor.add_request",
        "vllm.v1.engine.output_processor.OutputProcessor.process_outputs",
        "vllm.v1.engine.output_processor.RequestState._new_completion_output",
        "vllm.v1.engine.output_processor.RequestState._new_request_output",
        "vllm.v1.worker.worker_base.WorkerWrapperBase.init_device",
    ]
)


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    outer = {name: value for name, value in os.environ.items() if name != "VLLM_STEER_ACTIVE"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**outer, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder: its configuration is all that an engine configuration reads."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=40,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        dtype="float32",
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def steer_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("steers")
    paths = [str(folder / name) for name in ("one", "two")]
    for number, path in enumerate(paths):
        steer = LMSteer(
            variant="add", add=torch.full((1, 64), 1.0 + number), epsilon=1.0, hidden_size=64
        )
        save_steer(steer, path)
    return paths


@pytest.fixture(scope="module")
def processes(model: Path, steer_files: list[str]) -> Iterator[dict[str, Callable[[], Any]]]:
    """Both processes, started together; each is waited for when its overrides are first asked."""
    started = {
        "registered": start(REGISTER, str(model), *steer_files),
        "disabled": start(DISABLED, VLLM_STEER_DISABLE="1"),
    }
    overrides: dict[str, Any] = {}

    def facts_of(name: str) -> Any:
        if name not in overrides:
            out, errors = started[name].communicate(timeout=240)
            assert started[name].returncode == 0, errors
            overrides[name] = json.loads(out.splitlines()[-1])
        return overrides[name]

    yield {name: (lambda name=name: facts_of(name)) for name in started}
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture
def registered(processes: dict[str, Callable[[], Any]]) -> Any:
    return processes["registered"]()


def test_without_a_config_only_two_functions_are_patched(registered: Any) -> None:
    assert registered["changed"] == FIRST
    assert registered["environment"] == {}


def test_registering_again_wraps_nothing_twice(registered: Any) -> None:
    assert registered["changed_after_more"] == FIRST
    assert registered["wraps"] == {"add_cli_args": 1, "create_engine_config": 1}


def test_an_engine_without_a_config_is_stock_vllm(registered: Any) -> None:
    assert registered["changed_by_a_plain_engine"] == FIRST
    assert registered["plain_plan"] is True
    assert registered["hashes"]["plain"] == registered["hashes"]["stock"]


def test_an_engine_with_a_config_patches_the_declared_names(registered: Any) -> None:
    assert registered["changed_by_a_steered_engine"] == ALL


def test_two_plans_have_two_configuration_hashes(registered: Any, steer_files: list[str]) -> None:
    hashes = registered["hashes"]
    assert len({hashes["plain"], *(hashes[path] for path in steer_files)}) == 3
    assert all(hashes[path] == hashes[f"{path} again"] for path in steer_files)


def test_other_additional_config_is_kept_and_the_callers_is_not_changed(registered: Any) -> None:
    assert registered["other"] == {"kept": 1}
    assert registered["args_unchanged"] is True


def test_a_config_that_cannot_be_served_stops_the_engine(registered: Any) -> None:
    assert "gone: does not exist" in registered["refused"]


def test_a_disabled_plugin_changes_nothing(processes: dict[str, Callable[[], Any]]) -> None:
    assert processes["disabled"]()["changed"] == []


@pytest.mark.parametrize(
    ("value", "disables"),
    [("1", True), ("true", True), ("yes", True), ("TRUE", True), ("off", True), ("2", True),
     ("0", False), ("false", False), ("False", False), ("FALSE", False), ("", False), (" ", False)],
)  # fmt: skip
def test_any_value_except_0_and_false_disables_the_plugin(
    monkeypatch: pytest.MonkeyPatch, value: str, disables: bool
) -> None:
    from vllm_steer import environment, plugin
    from vllm_steer.compat import patching

    wrapped: list[str] = []
    monkeypatch.setattr(patching, "wrap", lambda owner, name, *args, **kwargs: wrapped.append(name))
    monkeypatch.setenv(environment.DISABLE, value)
    monkeypatch.delenv(environment.ACTIVE, raising=False)
    plugin.register()
    assert (wrapped == []) is disables


def test_the_distribution_enters_vllm_as_a_general_plugin_only() -> None:
    own_entries = {
        (point.group, point.name, point.value)
        for group in ("vllm.general_plugins", "vllm.logits_processors", "vllm.platform_plugins")
        for point in entry_points(group=group)
        if point.dist is not None and point.dist.name == "vllm-steer"
    }
    assert own_entries == {("vllm.general_plugins", "steer", "vllm_steer.plugin:register")}


@pytest.mark.parametrize(
    ("serves_dynamic", "active"),
    [(True, "steering,reports,streams"), (False, "steering,reports")],
    ids=["ordinary", "speculative"],
)
def test_an_engine_that_is_never_dynamic_reports_strengths_and_has_no_streams(
    monkeypatch: pytest.MonkeyPatch, serves_dynamic: bool, active: str
) -> None:
    """A request may ask for strengths without a dynamic steer, and gets none."""
    from vllm_steer import environment
    from vllm_steer.serving.activation import activate_steering

    monkeypatch.setenv(environment.ACTIVE, "")
    for _ in range(2):
        activate_steering(serves_dynamic=serves_dynamic)
    assert os.environ[environment.ACTIVE] == active
