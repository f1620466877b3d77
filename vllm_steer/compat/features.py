"""Which features the installed vLLM can serve: those whose names it has."""

from functools import cache

from packaging.version import InvalidVersion

from vllm_steer.compat.name import Feature, Name
from vllm_steer.compat.names import NAMES, names_of
from vllm_steer.compat.options import OPTIONS
from vllm_steer.compat.patching import advice
from vllm_steer.compat.source import INSTALLED, Source
from vllm_steer.compat.versions import installed_version


def all_names() -> tuple[Name, ...]:
    """Every name that is relied on, fields of vLLM's configuration included."""
    return (*NAMES, *(option.name for option in OPTIONS))


def missing_in(source: Source, version: str, names: tuple[Name, ...]) -> tuple[Name, ...]:
    """Those of some names that a vLLM of that version should have and has not."""
    return tuple(
        name
        for name in names
        if _should_have(name, version) and source.definition(name.module, name.path) is None
    )


@cache
def why_unavailable(feature: Feature) -> str | None:
    """Why the installed vLLM cannot serve a feature, and what to do; None if it can."""
    missing = missing_in(Source.of(INSTALLED), installed_version(), names_of(feature))
    if not missing:
        return None
    return f"vLLM {installed_version()} has no {', '.join(n.path for n in missing)}; {advice()}"


def _should_have(name: Name, version: str) -> bool:
    try:
        return name.is_in(version)
    except InvalidVersion:  # built from a source tree: take it for a new one
        return name.until is None
