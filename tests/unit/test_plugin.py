"""What the plugin changes in vLLM, when, and what it refuses.

Facts about global state are gathered in processes of their own (all started at once, each prints
one JSON object); the rest is asked of the functions themselves.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from vllm_steer import LMSteer, SteerError, save_steer

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
facts = {
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
facts["hashes"] = {"plain": plain.compute_hash(), "stock": stock.compute_hash()}
facts["changed_by_a_plain_engine"] = changed(before)
from vllm_steer.serving.engine_config import plan_of
facts["plain_plan"] = plan_of(plain) is None
for path in STEERS:
    args = config({"steer": {"steers": {"a": {"path": path}}}, "other": {"kept": 1}})
    given = json.dumps(args.additional_config)
    steered = args.create_engine_config()
    facts["hashes"][path] = steered.compute_hash()
    facts["hashes"][path + " again"] = args.create_engine_config().compute_hash()
    facts["other"] = steered.additional_config["other"]
    facts["args_unchanged"] = json.dumps(args.additional_config) == given
facts["changed_by_a_steered_engine"] = changed(before)
args = config({"steer": {"steers": {"a": {"path": "gone"}}}})
try:
    args.create_engine_config()
except ValueError as error:
    facts["refused"] = str(error)
print(json.dumps(facts))
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
    """Both processes, started together; each is waited for when its facts are first asked."""
    started = {
        "registered": start(REGISTER, str(model), *steer_files),
        "disabled": start(DISABLED, VLLM_STEER_DISABLE="1"),
    }
    facts: dict[str, Any] = {}

    def facts_of(name: str) -> Any:
        if name not in facts:
            out, errors = started[name].communicate(timeout=240)
            assert started[name].returncode == 0, errors
            facts[name] = json.loads(out.splitlines()[-1])
        return facts[name]

    yield {name: (lambda name=name: facts_of(name)) for name in started}
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture
def registered(processes: dict[str, Callable[[], Any]]) -> Any:
    return processes["registered"]()


def test_without_a_config_two_functions_are_changed_and_nothing_else(registered: Any) -> None:
    assert registered["changed"] == FIRST
    assert registered["environment"] == {}


def test_registering_again_wraps_nothing_twice(registered: Any) -> None:
    assert registered["changed_after_more"] == FIRST
    assert registered["wraps"] == {"add_cli_args": 1, "create_engine_config": 1}


def test_an_engine_without_a_config_stays_stock(registered: Any) -> None:
    assert registered["changed_by_a_plain_engine"] == FIRST
    assert registered["plain_plan"] is True
    assert registered["hashes"]["plain"] == registered["hashes"]["stock"]


def test_an_engine_with_a_config_patches_what_the_table_says(registered: Any) -> None:
    assert registered["changed_by_a_steered_engine"] == ALL


def test_two_plans_have_two_configuration_hashes(registered: Any, steer_files: list[str]) -> None:
    hashes = registered["hashes"]
    assert len({hashes["plain"], *(hashes[path] for path in steer_files)}) == 3
    assert all(hashes[path] == hashes[f"{path} again"] for path in steer_files)


def test_other_additional_config_is_kept_and_the_callers_is_not_changed(registered: Any) -> None:
    assert registered["other"] == {"kept": 1}
    assert registered["args_unchanged"] is True


def test_a_config_that_cannot_be_served_stops_the_engine(registered: Any) -> None:
    assert "gone: no such file" in registered["refused"]


def test_a_disabled_plugin_changes_nothing(processes: dict[str, Callable[[], Any]]) -> None:
    assert processes["disabled"]()["changed"] == []


@pytest.mark.parametrize(
    ("word", "disables"),
    [("1", True), ("true", True), ("yes", True), ("TRUE", True), ("off", True), ("2", True),
     ("0", False), ("false", False), ("False", False), ("FALSE", False), ("", False), (" ", False)],
)  # fmt: skip
def test_any_word_but_0_and_false_disables_the_plugin(
    monkeypatch: pytest.MonkeyPatch, word: str, disables: bool
) -> None:
    from vllm_steer import plugin

    wrapped: list[str] = []
    monkeypatch.setattr(plugin, "_wrap", lambda owner, name, *args, **kwargs: wrapped.append(name))
    monkeypatch.setenv(plugin.DISABLE, word)
    monkeypatch.delenv(plugin.ACTIVE, raising=False)
    plugin.register()
    assert (wrapped == []) is disables


def test_the_distribution_enters_vllm_as_a_general_plugin_only() -> None:
    ours = {
        (point.group, point.name, point.value)
        for group in ("vllm.general_plugins", "vllm.logits_processors", "vllm.platform_plugins")
        for point in entry_points(group=group)
        if point.dist is not None and point.dist.name == "vllm-steer"
    }
    assert ours == {("vllm.general_plugins", "steer", "vllm_steer.plugin:register")}


@pytest.fixture
def parse(tmp_path: Path, make_steer: Any) -> Callable[..., Any]:
    """vLLM's own ``serve`` parser with the plugin loaded."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
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
    found = parse(*options)
    assert found.additional_config == {"x": 1, "steer": str(tmp_path / "steers.yaml")}
    assert found.middleware == [MIDDLEWARE]
    assert found.served_model_name == ["model", "model:o", "model:p"]


def test_without_the_flag_the_parsed_arguments_are_stock(parse: Any) -> None:
    found = parse("model", "--additional-config", '{"x": 1}')
    assert found.additional_config == {"x": 1}
    assert found.middleware == []
    assert found.served_model_name is None


def test_a_steer_in_additional_config_is_served_like_the_flag(parse: Any) -> None:
    found = parse("model", "--additional-config", '{"steer": "STEERS"}')
    assert found.middleware == [MIDDLEWARE]
    assert found.served_model_name == ["model", "model:o", "model:p"]


def test_every_served_name_gets_every_preset_once(parse: Any) -> None:
    found = parse("model", "--steer-config=STEERS", "--served-model-name", "x", "y", "x:p")
    names = found.served_model_name
    assert names[0] == "x"
    assert {"x", "y", "x:o", "x:p", "y:o", "y:p"} <= set(names)
    assert len(names) == len(set(names))


def test_other_middleware_is_kept(parse: Any) -> None:
    found = parse("model", "--middleware", "mine.Own", "--steer-config=STEERS")
    assert found.middleware == ["mine.Own", MIDDLEWARE]


def test_a_parser_used_twice_gives_the_same(parse: Any) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    first = parse("model", "--steer-config=STEERS")
    parser = make_arg_parser(FlexibleArgumentParser())
    for _ in range(2):
        source = first.additional_config["steer"]
        found = parser.parse_args(["model", f"--steer-config={source}"])
        assert found.served_model_name == first.served_model_name
        assert found.middleware == first.middleware


def fake_config(plan: Any, **changed: Any) -> Any:
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(
            runner_type="generate",
            model="org/model",
            get_hidden_size=lambda: 6,
            get_vocab_size=lambda: 11,
        ),
        "device_config": SimpleNamespace(device_type="cpu"),
        "parallel_config": SimpleNamespace(
            prefill_context_parallel_size=1,
            use_ubatching=False,
            enable_batch_sharded_sampling=False,
        ),
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "speculative_config": None,
    }
    for path, value in changed.items():
        part, _, field = path.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    return SimpleNamespace(additional_config={"steer": plan.to_json()}, **parts)


@pytest.fixture
def check(make_plan: Any) -> Callable[..., None]:
    from vllm_steer.serving.engine_config import check_engine

    return lambda **changed: check_engine(fake_config(make_plan({"a": 1.0}), **changed))


def test_an_ordinary_engine_is_accepted(check: Any) -> None:
    check()
    check(speculative_config=SimpleNamespace(method="ngram"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_config__runner_type": "pooling"}, "pooling models; a steer changes generated"),
        (
            {"parallel_config__prefill_context_parallel_size": 2},
            "prefill context parallelism; set prefill_context_parallel_size to 1",
        ),
        ({"parallel_config__use_ubatching": True}, r"\(DBO\); leave enable_dbo off"),
        (
            {"parallel_config__enable_batch_sharded_sampling": True},
            "batch-sharded sampling; leave enable_batch_sharded_sampling off",
        ),
        (
            {"cache_config__kv_sharing_fast_prefill": True},
            "KV-sharing fast prefill; leave kv_sharing_fast_prefill off",
        ),
        (
            {"speculative_config": SimpleNamespace(enable_adaptive_verification=True)},
            "adaptive verification of draft tokens; leave enable_adaptive_verification off",
        ),
        (
            {"model_config__get_hidden_size": lambda: 8},
            r"steer a: /steers/a.safetensors: hidden size is 6; the model org/model has 8",
        ),
    ],
    ids=["pooling", "pcp", "dbo", "sharded-sampling", "fast-prefill", "adaptive", "hidden-size"],
)
def test_a_feature_in_the_way_stops_the_start_with_its_reason(
    check: Any, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        check(**changed)


def test_an_offset_of_another_vocabulary_stops_the_start(tmp_path: Path, make_steer: Any) -> None:
    from vllm_steer import SteerConfig
    from vllm_steer.plan import SteerPlan
    from vllm_steer.serving.engine_config import check_engine

    save_steer(make_steer("offset"), tmp_path / "tilt")
    plan = SteerPlan.of(SteerConfig.load({"steers": {"t": {"path": str(tmp_path / "tilt")}}}))
    check_engine(fake_config(plan))
    with pytest.raises(SteerError, match="tilt: vocabulary size is 11; the model org/model has 12"):
        check_engine(fake_config(plan, model_config__get_vocab_size=lambda: 12))


@pytest.fixture
def warnings_of_ours() -> Iterator[list[str]]:
    """Messages of the plugin's logger; vLLM's loggers do not propagate to pytest's."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_steer")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "version", ["0.25.0", "0.24.9", "0.34.0", "1.0.0", "0.1.dev1+g123", "0.25.1rc1", "dev"]
)
def test_a_vllm_outside_the_range_is_warned_of_once(
    check: Any, monkeypatch: pytest.MonkeyPatch, warnings_of_ours: list[str], version: str
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    check()
    assert len(warnings_of_ours) == 1
    assert f"vLLM {version} is outside the range" in warnings_of_ours[0]
    assert "0.25.1 to 0.33" in warnings_of_ours[0]


@pytest.mark.parametrize(
    "version", ["0.25.1", "0.28.0", "0.32.0", "0.32.0+cpu", "0.33.9", "0.31.1"]
)
def test_a_vllm_inside_the_range_is_not_warned_of(
    check: Any, monkeypatch: pytest.MonkeyPatch, warnings_of_ours: list[str], version: str
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    check()
    assert warnings_of_ours == []


@pytest.mark.parametrize("additional", [None, {}, {"x": 1}, {"steer": None}, "text"], ids=repr)
def test_an_additional_config_without_a_steer_is_no_concern_of_ours(additional: Any) -> None:
    from vllm_steer.serving.engine_config import plan_of, resolved_additional_config

    assert resolved_additional_config(additional) is None
    assert plan_of(SimpleNamespace(additional_config=additional)) is None


@pytest.fixture
def engine(make_plan: Any) -> Any:
    return fake_config(make_plan({"a": 1.0}, default="a:2", max_strength=5))


@pytest.mark.parametrize(
    "params",
    [
        None,
        SimpleNamespace(extra_args=None),
        SimpleNamespace(extra_args={}),
        SimpleNamespace(extra_args={"other": 1}),
        SimpleNamespace(extra_args={"steer": "a:1"}),
        SimpleNamespace(extra_args={"steer": "none"}),
        SimpleNamespace(),
    ],
    ids=repr,
)
def test_a_request_that_can_be_served_is_admitted_unchanged(engine: Any, params: Any) -> None:
    from vllm_steer.serving.admission import admit

    before = repr(params)
    admit(params, engine)
    assert repr(params) == before


def test_a_request_that_cannot_be_served_is_vllms_validation_error_and_ours(engine: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    from vllm_steer import SteerRequestError
    from vllm_steer.serving.admission import admit

    with pytest.raises(VLLMValidationError, match="strength 6; allowed: -5 to 5") as caught:
        admit(SimpleNamespace(extra_args={"steer": "a:6"}), engine)
    assert isinstance(caught.value, SteerRequestError)
    assert caught.value.parameter == "vllm_xargs.steer"


def test_a_rejection_survives_the_way_between_processes() -> None:
    import pickle

    from vllm_steer.serving.admission import RejectedSteer

    error = pickle.loads(pickle.dumps(RejectedSteer("a is unknown")))
    assert (type(error), str(error)) == (RejectedSteer, str(RejectedSteer("a is unknown")))
    assert error.parameter == "vllm_xargs.steer"


@pytest.mark.parametrize("steer", [None, "a:1", "none"], ids=repr)
@pytest.mark.parametrize("salt", [None, "mine"], ids=repr)
def test_a_steer_at_the_head_leaves_the_cache_key_alone(
    engine: Any, steer: Any, salt: str | None
) -> None:
    from vllm_steer.serving.admission import key_request

    params = SimpleNamespace(extra_args={"steer": steer} if steer else None)
    request = SimpleNamespace(
        sampling_params=params, cache_salt=salt, prompt_token_ids=[1, 2], prompt_embeds=None
    )
    key_request(request, engine)
    assert request.cache_salt == salt


def test_the_engine_core_refuses_what_the_frontend_did_not(engine: Any) -> None:
    from vllm_steer.serving.admission import RejectedSteer, key_request

    params = SimpleNamespace(extra_args={"steer": "b:1"})
    with pytest.raises(RejectedSteer, match="'b' is unknown; steers: a"):
        key_request(SimpleNamespace(sampling_params=params, cache_salt=None), engine)


def test_a_pooling_request_has_no_cache_key_of_ours(engine: Any) -> None:
    from vllm_steer.serving.admission import key_request

    request = SimpleNamespace(sampling_params=None, cache_salt=None, prompt_token_ids=[1])
    key_request(request, engine)
    assert request.cache_salt is None
