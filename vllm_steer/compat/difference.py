"""What changed between two vLLM versions in the definitions that vllm-steer relies on."""

import ast
import difflib
from collections.abc import Iterator

from vllm_steer.compat.features import all_names
from vllm_steer.compat.vllm_name import VllmName
from vllm_steer.compat.vllm_source import VllmSource


def differences(old: VllmSource, new: VllmSource) -> Iterator[tuple[VllmName, str]]:
    """Each name whose definition is not the same, and how: ``gone``, ``new`` or a unified diff.

    Comments, docstrings and the layout of lines do not count. Of a class only its fields and the
    heads of its methods do: the methods that matter have names of their own.
    """
    for name in all_names():
        before, after = (_text(source.definition(name.module, name.path)) for source in (old, new))
        if before == after:
            continue
        if before is None or after is None:
            yield name, "new" if before is None else "gone"
        else:
            lines = difflib.unified_diff(before, after, "old", "new", lineterm="", n=2)
            yield name, "\n".join([*lines][2:])


def _text(definition: ast.AST | None) -> list[str] | None:
    """A definition in lines that depend on nothing but what it does."""
    if definition is None:
        return None
    if isinstance(definition, ast.ClassDef):
        heads = [_head(statement) for statement in definition.body]
        return [f"class {definition.name}", *filter(None, heads)]
    return ast.unparse(_DocstringRemover().visit(ast.parse(ast.unparse(definition)))).splitlines()


def _head(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"def {node.name}({ast.unparse(node.args)})"
    return ast.unparse(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ""


class _DocstringRemover(ast.NodeTransformer):
    """Takes docstrings out."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1 and _is_text(body[0]):
            node.body = body[1:]  # type: ignore[attr-defined]
        return node


def _is_text(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
