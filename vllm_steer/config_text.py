"""Parses the text of a steer config, YAML or JSON, to plain values, within bounds and
unambiguously.

YAML expands a few bytes to very many values (aliases), lets a later key silently replace an earlier
one, and reads ``1_0`` and ``1:30`` as numbers. Here the expanded size of aliases is limited, a
duplicate key is an error, and numbers are decimal, as in JSON. (``yes`` and ``no`` are booleans, as
in YAML 1.1.)
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import yaml

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.json_text import NotJSONError, read_json
from vllm_steer.files.size_limits import MAX_DEPTH, MAX_VALUES, check_nesting
from vllm_steer.untrusted_text import printable, shown

LARGEST: Final = 256 * 1024
"""Bytes of a config. PyYAML reads some 100 kB a second."""
_NUMBERS: Final = (
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)

_TAG: Final = "tag:yaml.org,2002:"
_REPLACED_TAGS: Final = frozenset({_TAG + name for name in ("int", "float", "timestamp")})
_TEXT: Final = _TAG + "str"
_YAML11_LINE_BREAKS: Final = re.compile("[\x85\u2028\u2029]")
_MERGE: Final = _TAG + "merge"


def read_config_file(path: Path, origin: str) -> Any:
    """The values of a YAML or JSON file. Raises ``SteerError`` that names ``origin``."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise SteerError(f"{origin} is larger than {LARGEST} bytes; give a config of steers")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SteerError(
            f"{origin} is neither YAML nor JSON: it is not UTF-8 ({cause(error)}); save it as UTF-8"
        ) from None
    return read_config_text(text, origin)


def read_config_text(text: str, origin: str) -> Any:
    """The values of a YAML or JSON text. Raises ``SteerError`` that names ``origin``."""
    if text.lstrip().startswith("{"):
        with suppress(NotJSONError):  # it may be YAML's flow style
            return read_json(text, origin)
    _check_lines(text, origin)
    try:
        return _read_yaml(text, origin)
    except SteerError:
        raise
    except RecursionError:
        raise SteerError(f"{origin} is nested more than {MAX_DEPTH} deep") from None
    except Exception as error:  # PyYAML's own errors, and those that its constructors raise
        raise SteerError(f"{origin} is neither YAML nor JSON: {_cause(error)}") from None


def _check_lines(text: str, origin: str) -> None:
    """Raise ``SteerError`` for characters that end a line only in YAML before 1.2."""
    for number, line in enumerate(text.split("\n"), 1):
        if match := _YAML11_LINE_BREAKS.search(line):
            raise SteerError(
                f"{origin}: line {number}: the character {printable(match[0])}, which ends a line "
                "for some readers; write it as an escape, in quotes"
            )


def _read_yaml(text: str, origin: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _NodeCheck(loader, origin).count(node)
        value = loader.construct_document(node)
    finally:
        loader.dispose()
    check_nesting(value, origin)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2; dates stay strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _regexp, _first in _NUMBERS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_regexp})$"), list(_first))


class _NodeCheck:
    """Checks the nodes of a document before they become values.

    Each node is checked once and counted once per alias that refers to it.
    """

    def __init__(self, loader: yaml.SafeLoader, origin: str) -> None:
        self._loader = loader
        self._origin = origin
        self._known: dict[int, int] = {}
        self._open: set[int] = set()
        self._merged: dict[int, list[yaml.Node]] = {}

    def count(self, node: yaml.Node, depth: int = 0) -> int:
        """The number of values of a node. Raises ``SteerError`` for a node that is not allowed."""
        key = id(node)
        if key in self._open:
            raise self._wrong(node, "an alias holds itself")
        if key in self._known:
            return self._known[key]
        if depth > MAX_DEPTH:
            raise SteerError(f"{self._origin} is nested more than {MAX_DEPTH} deep")
        self._check_tag(node)
        self._open.add(key)
        total = 1 + sum(self.count(inner, depth + 1) for inner in self._inner(node))
        self._open.discard(key)
        if total > MAX_VALUES:
            problem = (
                f"more than {MAX_VALUES} values, those that aliases stand for counted each time"
            )
            raise self._wrong(node, problem)
        self._known[key] = total
        return total

    def _inner(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        if not isinstance(node, yaml.MappingNode):
            return []
        self._check_keys([key for key, _ in node.value])
        for key, value in node.value:
            if key.tag == _MERGE and isinstance(value, yaml.SequenceNode):
                # PyYAML's releases differ in which one is used.
                mappings = [m for m in value.value if isinstance(m, yaml.MappingNode)]
                self._check_keys([k for mapping in mappings for k in self._all_keys(mapping)])
        return [part for pair in node.value for part in pair]

    def _all_keys(self, node: yaml.MappingNode) -> list[yaml.Node]:
        """A mapping's keys, including merged ones; a merge that contains itself was refused."""
        if id(node) not in self._merged:
            self._merged[id(node)] = keys = []
            for key, value in node.value:
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                if key.tag != _MERGE:
                    keys.append(key)
                for inner in merged if key.tag == _MERGE else ():
                    if isinstance(inner, yaml.MappingNode):
                        keys += self._all_keys(inner)
            key_by_name = {key.value: key for key in reversed(keys)}
            self._merged[id(node)] = list(key_by_name.values())
        return self._merged[id(node)]

    def _check_keys(self, keys: list[yaml.Node]) -> None:
        seen = set()
        for key in keys:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                if isinstance(key, yaml.ScalarNode):
                    problem = f"the key {shown(key.value)} is no text; put it in quotes"
                else:
                    problem = "a key is a list or a mapping; expected a text"
                raise self._wrong(key, problem)
            if key.value in seen:
                raise self._wrong(key, f"the key {shown(key.value)} is given twice")
            seen.add(key.value)

    def _check_tag(self, node: yaml.Node) -> None:
        """Check that a tag agrees with the type of the value's text."""
        if isinstance(node, yaml.ScalarNode):
            if any("\ud800" <= letter <= "\udfff" for letter in node.value):
                raise self._wrong(node, f"{shown(node.value)} has letters that are not Unicode")
            resolved_tag = self._loader.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
        else:
            resolved_tag = _TAG + ("seq" if isinstance(node, yaml.SequenceNode) else "map")
        as_text = isinstance(node, yaml.ScalarNode) and node.tag == _TEXT
        if node.tag != resolved_tag and not as_text:
            raise self._wrong(node, f"the tag {shown(node.tag)}; expected plain values")

    def _wrong(self, node: yaml.Node, problem: str) -> SteerError:
        return SteerError(f"{self._origin}: line {node.start_mark.line + 1}: {problem}")


def _cause(error: Exception) -> str:
    """PyYAML's error and its position, in one line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return cause(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
