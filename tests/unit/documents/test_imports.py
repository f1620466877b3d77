"""Every name that is imported from our own packages exists, also where a function imports it."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OURS = ("vllm_steer", "benchmarks")
FILES = sorted(
    path
    for folder in ("vllm_steer", "kernels", "benchmarks", "tests", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if "vllm_steer/kernels" not in str(path)
)


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """The module and the name of each ``from ... import`` of ours, at any depth."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    imports = (node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level)
    for node in imports:
        if node.module and node.module.partition(".")[0] in OURS:
            yield from ((node.module, alias.name) for alias in node.names)


def exists(module: str, name: str) -> bool:
    if hasattr(import_module(module), name):
        return True
    try:
        import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def test_every_imported_name_exists() -> None:
    names = {pair for path in FILES for pair in imported_names(path)}
    assert len(names) > 500
    assert sorted(pair for pair in names if not exists(*pair)) == []


@pytest.mark.parametrize("name", ["no_such_name", "no.such.module"])
def test_a_name_that_does_not_exist_is_found(name: str) -> None:
    assert not exists("vllm_steer.plan", name)
