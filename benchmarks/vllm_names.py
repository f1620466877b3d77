"""The table of wrapped names of vLLM, from the list that the code uses."""

from itertools import groupby

from vllm_steer.compat.names import GLOBAL, NAMES
from vllm_steer.compat.vllm_name import VllmName


def wrapped() -> str:
    """The table in Markdown: first names on classes and in modules, then those on instances."""
    names = [*GLOBAL, *(n for n in NAMES if n.use in ("wrapped", "subclassed") and n not in GLOBAL)]
    lines = ["| wrapped | where | feature | why |", "| --- | --- | --- | --- |"]
    for (feature, why, location), group in groupby(names, lambda n: (n.feature, n.why, _where(n))):
        paths = ", ".join(dict.fromkeys(f"`{_shown(name)}`" for name in group))
        lines.append(f"| {paths} | {location} | {feature} | {why} |")
    return "\n".join(lines)


def _where(name: VllmName) -> str:
    return name.process or ("a subclass" if name.use == "subclassed" else "the instance")


def _shown(name: VllmName) -> str:
    if name.since:
        return f"{name.path} (from {name.since} on)"
    return f"{name.path} (before {name.until})" if name.until else name.path
