"""The seam to vLLM: every name that is relied on exists, is declared, and is reached in one way."""

import ast
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_steer
from vllm_steer import SteerError
from vllm_steer.compat import names, options
from vllm_steer.compat.__main__ import main
from vllm_steer.compat.difference import differences
from vllm_steer.compat.features import all_names, missing_in, unavailable_reason
from vllm_steer.compat.patching import missing_name, unknown_behavior, wrap
from vllm_steer.compat.versions import installed_version
from vllm_steer.compat.vllm_name import VllmName
from vllm_steer.compat.vllm_source import INSTALLED, VllmSource

PACKAGE = Path(vllm_steer.__file__).parent
SEAM = [PACKAGE / "plugin.py", *sorted((PACKAGE / "serving").rglob("*.py"))]
"""The files in which vLLM's objects are handled."""


def test_this_vllm_has_every_name_and_the_check_is_fast() -> None:
    begin = time.process_time()
    missing = missing_in(VllmSource.of(INSTALLED), installed_version(), all_names())
    assert [f"{name.module}:{name.path} ({name.feature})" for name in missing] == []
    assert time.process_time() - begin < 4  # below 1 s on a quiet machine


def test_every_name_is_declared_once() -> None:
    names = [(name.module, name.path, name.use, name.process) for name in all_names()]
    assert len(names) == len(set(names))


def test_no_file_imports_anything_else_of_vllm() -> None:
    declared = {(name.module, name.path.partition(".")[0]) for name in all_names()}
    modules = {name.module for name in all_names()}
    undeclared = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                undeclared += [
                    (file.name, alias.name)
                    for alias in node.names
                    if alias.name.partition(".")[0] == "vllm"
                ]
            if not (isinstance(node, ast.ImportFrom) and node.module):
                continue
            if node.module.partition(".")[0] == "vllm":
                undeclared += [
                    (file.name, node.module, alias.name)
                    for alias in node.names
                    if (node.module, alias.name) not in declared
                    and f"{node.module}.{alias.name}" not in modules
                ]
    assert undeclared == []


VLLMS = {
    *(
        "scheduler",
        "_scheduler",
        "runner",
        "core",
        "worker",
        "_worker",
        "model_runner",
        "processor",
    ),
    *("request", "stream", "member", "main", "new", "own", "client", "ended", "state", "queue"),
    *("scheduler_output", "runner_output", "output", "outputs", "completion", "input_batch"),
    *("params", "sampling_params", "vllm_config", "config", "drafts"),
}
"""Variables that hold objects of vLLM; some of them hold ours elsewhere."""


def test_no_file_reads_anything_else_of_vllms_objects() -> None:
    own_attributes = {
        "steer_streams",
        "steer_request_group",
        "steer_strengths",
        "vllm_steer_streams",
        "steer_config",
    }
    # of the parsed command line
    own_attributes |= {"model_tag", "middleware", "input_file", "output_file"}
    own_attributes |= {"engine_client"}  # of the application's state; a test over HTTP asks by it
    own_attributes |= {
        attribute for kind in (dict, list, set, str, object) for attribute in dir(kind)
    }
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own_attributes.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                own_attributes.add(getattr(node.target, "id", getattr(node.target, "attr", "")))
    declared = {name.member for name in all_names()}
    undeclared = [
        (file.name, name)
        for file in SEAM
        for name in _reads(ast.parse(file.read_text()))
        if name not in declared | own_attributes
    ]
    assert undeclared == []


def _reads(tree: ast.AST) -> list[str]:
    """Attributes of the variables above, and names that are looked up as texts."""
    reads = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = getattr(node.value, "id", getattr(node.value, "attr", None))
            reads += [node.attr] if of in VLLMS else []
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            reads += [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
    return reads


def test_the_configuration_is_read_through_options_only() -> None:
    """``getattr`` with a default would hide an option that vLLM has renamed."""
    parts = {option.section.partition(".")[0] for option in options.OPTIONS} - {""}
    reads = [
        (file.name, node.lineno)
        for file in SEAM
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in parts
        if getattr(node.value, "id", None) not in ("options", "self")  # of EngineArgs
    ]
    assert reads == []


@pytest.mark.parametrize("option", options.OPTIONS, ids=lambda option: option.field)
def test_a_missing_option_is_an_error(
    option: options.Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "installed_version", lambda: "0.32.0")
    value: Any = SimpleNamespace()
    for part in reversed([part for part in option.section.split(".") if part]):
        value = SimpleNamespace(**{part: value})
    if option.name.is_in("0.32.0"):
        message = f"vLLM 0.32.0 has no {option.cls}.{option.field}, .* supports vLLM 0.25.1 to"
        with pytest.raises(SteerError, match=message):
            option(value)
    else:
        assert option(value) == option.default
    monkeypatch.setattr(options, "installed_version", lambda: "9.0")
    if option.until is None:
        with pytest.raises(SteerError, match=r"vLLM 9\.0 has no"):
            option(value)


@pytest.mark.parametrize(
    ("version", "lacks_enable_sp"),
    [
        *((version, False) for version in ("0.25.1", "0.30.0", "0.31.0")),
        *((version, True) for version in ("0.32.0", "0.32.0+cpu", "0.32.0rc1", "0.33.1.dev7")),
        *((version, True) for version in ("0.31.1rc1.dev400", "0.31.0rc1", "dev", "1.0")),
    ],
)
def test_a_development_build_may_match_either_release(
    version: str, lacks_enable_sp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "installed_version", lambda: version)
    config = SimpleNamespace(compilation_config=SimpleNamespace(pass_config=SimpleNamespace()))
    if lacks_enable_sp:
        assert options.enable_sp(config) is False
    else:
        with pytest.raises(SteerError, match=r"has no PassConfig\.enable_sp"):
            options.enable_sp(config)


def test_a_missing_section_is_an_error() -> None:
    with pytest.raises(SteerError, match=r"has no CacheConfig\.kv_sharing_fast_prefill"):
        options.kv_sharing_fast_prefill(SimpleNamespace())


def test_a_missing_part_of_an_engine_leaves_the_default() -> None:
    config = SimpleNamespace(speculative_config=None, kv_transfer_config=None)
    assert options.enable_adaptive_verification(config) is False
    assert options.kv_connector(config) is None


class Wrapped:
    """Has one of the methods that are wrapped."""

    def execute_model(self, step: int) -> int:
        return step + 1


def test_a_method_is_wrapped_on_a_class_and_on_an_instance() -> None:
    def twice(original: Any, *args: Any) -> Any:
        return 2 * original(*args)

    class Own(Wrapped):
        execute_model = Wrapped.execute_model

    one, other = Own(), Own()
    wrap(one, "execute_model", twice)
    assert (one.execute_model(3), other.execute_model(3)) == (8, 4)
    for _ in range(2):
        wrap(Own, "execute_model", twice, once=True)
    assert other.execute_model(3) == 8
    assert Own.execute_model.__wrapped__ is Wrapped.execute_model  # type: ignore[attr-defined]


def test_undeclared_names_are_not_wrapped() -> None:
    with pytest.raises(KeyError):
        wrap(Wrapped(), "something_else", lambda original: original())


def test_a_missing_method_is_named_with_its_purpose() -> None:
    with pytest.raises(SteerError) as caught:
        wrap(Wrapped(), "sample_tokens", lambda original: original())
    assert str(caught.value) == (
        f"vLLM {installed_version()} has no Wrapped.sample_tokens, which vllm-steer needs for "
        "steering (a step begins, and ends); vllm-steer supports vLLM 0.25.1 to 0.33: "
        "install one of these versions"
    )
    assert "EngineCore.add_request" in missing_name(names.names_of("dynamic strength")[0])
    assert f"vLLM {installed_version()} does not do what vllm-steer" in unknown_behavior("a step")


OLD = """
class Base:
    held = 1
class Engine(Base):
    def __init__(self):
        self.queue, self.count = [], 0
    def run(self, steps):
        '''Old words.'''
        return steps + 1
    def gone(self): ...
def free(x): return x
"""
NEW = """
from vllm.other import free
class Base:
    held: int = 1
class Engine(Base):
    def __init__(self):
        self.queue, self.count = [], 0
    # New words.
    def run(self, steps):
        return steps + 2
"""


def package(folder: Path, **modules: str) -> VllmSource:
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("")
    for name, text in modules.items():
        (folder / "vllm" / f"{name}.py").write_text(textwrap.dedent(text))
    return VllmSource.of(str(folder))


@pytest.mark.parametrize(
    ("path", "is_defined"),
    [
        *((path, True) for path in ("Engine", "Engine.run", "Engine.queue", "Engine.count")),
        *((path, True) for path in ("Engine.held", "free", "Base.held")),
        *((path, False) for path in ("Engine.gone", "Engine.steps", "x", "free.y", "Other.run")),
    ],
)
def test_definitions_are_found_without_importing(
    tmp_path: Path, path: str, is_defined: bool
) -> None:
    source = package(tmp_path, engine=NEW, other="def free(x): return x\nraise RuntimeError\n")
    assert (source.definition("vllm.engine", path) is not None) is is_defined


def test_the_difference_of_two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = package(tmp_path / "old", engine=OLD)
    new = package(tmp_path / "new", engine=NEW, other="def free(x): return x\n")
    paths = ("Engine.run", "Engine.gone", "Engine.queue", "free")
    expected = tuple(VllmName("vllm.engine", path, "called", "steering") for path in paths)
    monkeypatch.setattr("vllm_steer.compat.difference.all_names", lambda: expected)
    names = {name.path: text for name, text in differences(old, new)}
    assert names == {
        "Engine.run": "@@ -1,2 +1,2 @@\n def run(self, steps):\n-    return steps + 1\n"
        "+    return steps + 2",
        "Engine.gone": "gone",
    }


def test_the_command_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert "missing" not in capsys.readouterr().out
    empty = package(tmp_path)
    monkeypatch.setattr("vllm_steer.compat.__main__.VllmSource.of", lambda source: empty)
    assert main([]) == 1
    output = capsys.readouterr().out
    assert "missing: vllm.v1.engine.core:EngineCore.add_request (wrapped)" in output


@pytest.mark.parametrize("arguments", [["one"], ["one", "two", "three"], ["/nowhere", "/nowhere"]])
def test_the_command_prints_its_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_the_declared_names_are_read_without_vllm() -> None:
    modules = "vllm_steer.compat.options, vllm_steer.compat.patching"
    code = f"import sys, {modules}; print('vllm' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == "False\n"


def test_a_feature_that_this_vllm_lacks_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unavailable_reason("dynamic strength") is None
    empty = package(tmp_path)
    monkeypatch.setattr("vllm_steer.compat.features.VllmSource.of", lambda source: empty)
    unavailable_reason.cache_clear()
    try:
        reason = unavailable_reason("LoRA")
    finally:
        unavailable_reason.cache_clear()
    assert reason is not None
    assert reason.startswith(f"vLLM {installed_version()} has no ")
    assert "LoRAMapping" in reason
