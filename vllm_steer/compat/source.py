"""Definitions in the Python files of one vLLM, found without importing it.

Importing vLLM takes seconds and a platform that it supports; its files can be read anywhere, two
versions side by side.
"""

import ast
import importlib.util
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vllm_steer.errors import SteerError

INSTALLED: Final = "installed"
_MOST_BASES: Final = 40


class Source:
    """One vLLM: ``root`` is the folder or the zip archive that holds the package ``vllm``."""

    def __init__(self, root: Path) -> None:
        self._root = zipfile.Path(root) if root.is_file() else root
        self._modules: dict[str, ast.Module | None] = {}
        self._names: dict[ast.Module, dict[str, ast.AST]] = {}
        self._imports: dict[ast.Module, dict[str, tuple[str, str]]] = {}
        self._members: dict[ast.ClassDef, dict[str, ast.AST]] = {}

    @classmethod
    def of(cls, given: str) -> "Source":
        """``installed``, a wheel, or the folder that a wheel was unpacked to.

        Raises ``SteerError`` where there is no vLLM.
        """
        root = _installed() if given == INSTALLED else Path(given)
        try:
            source = cls(root)
            found = source._text("vllm") is not None
        except (OSError, zipfile.BadZipFile):
            found = False
        if not found:
            raise SteerError(
                f"{given}: no vLLM is there; give {INSTALLED!r}, a wheel of vLLM, or the folder "
                "that one was unpacked to"
            )
        return source

    def definition(self, module: str, path: str) -> ast.AST | None:
        """Where ``path`` is defined, such as ``Request.status``; None if it is not.

        A function, a class, a field of a class, or an attribute that a method of the class gives to
        ``self``; of a base class too.
        """
        owner, _, member = path.partition(".")
        found = self._in_module(module, owner)
        if found is None or not member:
            return None if found is None else found[1]
        return self._in_class(*found, member) if isinstance(found[1], ast.ClassDef) else None

    def _in_module(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines a name, and the definition; imports are followed."""
        for _ in range(_MOST_BASES):
            tree = self._tree(module)
            if tree is None:
                return None
            if tree not in self._names:
                self._names[tree], self._imports[tree] = _names(tree), _imports(tree)
            if name in self._names[tree]:
                return module, self._names[tree][name]
            imported = self._imports[tree].get(name)
            if imported is None:
                return None
            module, name = imported
        return None

    def _in_class(self, module: str, cls: ast.AST, member: str) -> ast.AST | None:
        for each in self._with_bases(module, cls):
            if each not in self._members:
                self._members[each] = _members(each)
            if member in self._members[each]:
                return self._members[each][member]
        return None

    def _with_bases(self, module: str, cls: ast.AST) -> Iterator[ast.ClassDef]:
        """A class and its bases, as far as they are vLLM's."""
        waiting, seen = [(module, cls)], 0
        while waiting and seen < _MOST_BASES:
            where, each = waiting.pop(0)
            seen += 1
            if not isinstance(each, ast.ClassDef):
                continue
            yield each
            for base in each.bases:
                name = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(name, ast.Name):
                    found = self._in_module(where, name.id)
                    if found is not None:
                        waiting.append(found)

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._modules:
            text = self._text(module) if module.partition(".")[0] == "vllm" else None
            self._modules[module] = None if text is None else ast.parse(text)
        return self._modules[module]

    def _text(self, module: str) -> str | None:
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            file = self._root / name
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return None


def _installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SteerError("vLLM is not installed")
    return Path(spec.origin).parents[1]


def _names(tree: ast.Module) -> dict[str, ast.AST]:
    """What a module defines at its top, in ``if`` and ``try`` too."""
    found: dict[str, ast.AST] = {}
    for node in _statements(tree.body):
        for name in _defined(node):
            found.setdefault(name, node)
    return found


def _imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """By the name here: module and name that it was imported from."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    }


def _members(cls: ast.ClassDef) -> dict[str, ast.AST]:
    """Methods and fields, and what methods give to ``self``."""
    found: dict[str, ast.AST] = {}
    for statement in _statements(cls.body):
        for name in _defined(statement):
            found.setdefault(name, statement)
    for node in ast.walk(cls):
        for target in _targets(node):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                found.setdefault(target.attr, node)
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    return [target.id for target in _targets(node) if isinstance(target, ast.Name)]


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:
        return []
    return [t for each in targets for t in (each.elts if isinstance(each, ast.Tuple) else [each])]
