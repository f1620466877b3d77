"""Results of tests with a vLLM version: counted from pytest's report, shown in the documents."""

import importlib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.versions import versions

ROOT = Path(__file__).parents[3]

REPORT = """<testsuites><testsuite>
<testcase classname="a" name="one"/>
<testcase classname="a" name="two[x]"/>
<testcase classname="a" name="three"><skipped message="no card" type="pytest.skip"/></testcase>
<testcase classname="b" name="four"><failure message="wrong"/></testcase>
<testcase classname="b" name="five"/>
<testcase classname="b" name="five"><error message="at its end"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def version_runs(scripts: None) -> ModuleType:
    return importlib.import_module("test_version")


@pytest.fixture
def environment(scripts: None) -> ModuleType:
    return importlib.import_module("make_environment")


def test_a_report_is_counted_by_test(version_runs: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT, encoding="utf-8")
    assert version_runs.outcome(path) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "failures": ["b::five", "b::four"],
        "skips": {"no card": ["a::three"]},
    }
    nothing = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": {}}
    assert version_runs.outcome(None) == nothing


def run_of(**changed: Any) -> dict[str, Any]:
    return {
        "passed": 7,
        "failed": 0,
        "skipped": 0,
        "failures": [],
        "skips": {},
        "exit_code": 0,
        "versions": {"torch": "2", "triton": "3", "transformers": "5", "python": "3.11"},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "date": "2026-11-28T10:00:00+00:00",
    } | changed


def test_the_table_has_a_row_per_version_and_names_failures() -> None:
    broken = run_of(
        failed=1, skipped=1, failures=["t::b"], skips={"no card": ["t::a"]}, exit_code=124
    )
    skipped = run_of(skipped=2, skips={"no card": ["t::a", "t::b"]})
    results = [
        {"vllm": "0.31.0", "runs": {"v1": broken}},
        {"vllm": "0.9.0", "runs": {"v1": run_of(), "v2": skipped}},
    ]
    table = versions(results)
    packages = "torch 2, triton 3, transformers 5, python 3.11"
    origin = "0123456789ab, 2026-11-28"
    assert table.splitlines() == [
        "| vLLM | engine V1 | engine V2 | with | commit, date |",
        "| --- | --- | --- | --- | --- |",
        f"| 0.9.0 | 7 passed | 7 passed, 2 skipped | {packages} | {origin} |",
        "| 0.31.0 | 7 passed, 1 failed, 1 skipped, broken off (124) | not run "
        f"| {packages} | {origin} |",
        "",
        "- skipped, no card: 0.9.0 engine V2 (2); 0.31.0 engine V1 (1)",
        "- failed, 0.31.0 engine V1: `t::b`",
    ]


def test_every_version_with_results_is_inside_the_range() -> None:
    from vllm_steer.compat.versions import is_supported

    names = [path.stem for path in (ROOT / "benchmarks/results/versions").glob("*.json")]
    assert names
    assert all(is_supported(name.removeprefix("vllm-")) for name in names)
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert all(f"| {name.removeprefix('vllm-')} |" in page for name in names)


def test_a_wheels_own_requirements_are_read_without_its_extras(
    environment: ModuleType, tmp_path: Path
) -> None:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "some-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: some\nRequires-Dist: torch==2.11.0+cpu; x\n"
            'Requires-Dist: big; extra == "all"\nRequires-Dist: numpy\n\nRequires-Dist: text\n',
        )
    assert environment.requirements(wheel) == ["torch==2.11.0+cpu; x", "numpy"]


@pytest.mark.parametrize(
    ("found_at", "expected"),
    [
        (1, ("torch==2.11.0+cpu", [])),
        (2, ("torch==2.11.0+cpu", ["--extra-index-url", "INDEX"])),
        (3, ("torch==2.11.0", [])),
    ],
    ids=["configured", "index", "nowhere"],
)
def test_torch_for_cpus_is_preferred_to_torch_for_cuda(
    environment: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    found_at: int,
    expected: tuple[str, list[str]],
) -> None:
    commands: list[Any] = []

    def finds(*arguments: Any) -> bool:
        commands.append(arguments)
        return len(commands) == found_at

    monkeypatch.setattr(environment, "finds", finds)
    monkeypatch.setattr(environment, "CPU_TORCH_INDEX", "INDEX")
    assert environment.torch_for(["pip"], "torch==2.11.0+cpu") == expected
    assert len(commands) == min(found_at, 2)


def test_the_stand_in_for_vllm_has_the_versions_name(
    environment: ModuleType, tmp_path: Path
) -> None:
    text = Path(environment.vllm_stub(tmp_path, "0.28.0"), "pyproject.toml").read_text("utf-8")
    assert 'name = "vllm"' in text and 'version = "0.28.0+cpu"' in text
    assert "dependencies" not in text
