"""Definitions in the Python files of one vLLM, found without importing it.

An import of vLLM takes seconds and needs a supported platform; its files can be read anywhere, and
for two versions at once.
"""

import ast
import importlib.util
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vllm_steer.errors import SteerError

INSTALLED: Final = "installed"
_MAX_BASES: Final = 40


class VllmSource:
    """One vLLM: ``root`` is the folder or the zip archive that holds the package ``vllm``."""

    def __init__(self, root: Path) -> None:
        self._root = zipfile.Path(root) if root.is_file() else root
        self._modules: dict[str, ast.Module | None] = {}
        self._names: dict[ast.Module, dict[str, ast.AST]] = {}
        self._imports: dict[ast.Module, dict[str, tuple[str, str]]] = {}
        self._members: dict[ast.AST, dict[str, ast.AST]] = {}

    @classmethod
    def of(cls, location: str) -> "VllmSource":
        """The source of ``installed``, of a wheel, or of the folder of an unpacked wheel. Raises
        ``SteerError`` if there is no vLLM.
        """
        root = _installed() if location == INSTALLED else Path(location)
        try:
            source = cls(root)
            has_vllm = source._text("vllm") is not None
        except (OSError, zipfile.BadZipFile):
            has_vllm = False
        if not has_vllm:
            raise SteerError(
                f"{location}: no vLLM is there; give {INSTALLED!r}, a wheel of vLLM, or the folder "
                "that one was unpacked to"
            )
        return source

    def definition(self, module: str, path: str) -> ast.AST | None:
        """Where ``path`` is defined, such as ``Request.status``; None if it is not.

        Finds functions, classes, fields of a class, and attributes that a method assigns to
        ``self``, also in base classes.
        """
        owner, _, member = path.partition(".")
        located = self._in_module(module, owner)
        if located is None or not member:
            return None if located is None else located[1]
        is_owner = isinstance(located[1], ast.ClassDef | ast.FunctionDef)
        return self._in_class(*located, member) if is_owner else None

    def _in_module(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The module that defines a name, and the definition; imports are followed."""
        for _ in range(_MAX_BASES):
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
        for class_def in self._with_bases(module, cls):
            if class_def not in self._members:
                self._members[class_def] = _members(class_def)
            if member in self._members[class_def]:
                return self._members[class_def][member]
        return None

    def _with_bases(self, module: str, cls: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef]:
        """A class and those of its bases that are in vLLM."""
        pending, num_visited = [(module, cls)], 0
        while pending and num_visited < _MAX_BASES:
            class_module, class_def = pending.pop(0)
            num_visited += 1
            if isinstance(class_def, ast.FunctionDef):
                yield class_def  # a decorator that gives attributes to its class
            if not isinstance(class_def, ast.ClassDef):
                continue
            yield class_def
            for base in class_def.bases:
                name = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(name, ast.Name):
                    located = self._in_module(class_module, name.id)
                    if located is not None:
                        pending.append(located)

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
    """The top-level definitions of a module, including those in ``if`` and ``try``."""
    definitions: dict[str, ast.AST] = {}
    for node in _statements(tree.body):
        for name in _defined(node):
            definitions.setdefault(name, node)
    return definitions


def _imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Maps each imported name to its module and its name there."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    }


def _members(cls: ast.ClassDef | ast.FunctionDef) -> dict[str, ast.AST]:
    """Methods and fields of a class, and attributes that methods assign to ``self``."""
    members: dict[str, ast.AST] = {}
    for statement in _statements(cls.body):
        for name in _defined(statement):
            members.setdefault(name, statement)
    for node in ast.walk(cls):
        for target in _targets(node):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                members.setdefault(target.attr, node)
    return members


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
    return [
        t
        for target in targets
        for t in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
