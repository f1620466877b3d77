"""Which features the installed vLLM can serve: those whose names it has."""

from functools import cache

from vllm_steer.compat.name import Feature, Name
from vllm_steer.compat.names import NAMES
from vllm_steer.compat.options import OPTIONS, SECTIONS
from vllm_steer.compat.patching import advice
from vllm_steer.compat.source import INSTALLED, Source
from vllm_steer.compat.versions import installed_version
from vllm_steer.environment import REPORTS, is_active
from vllm_steer.errors import SteerError


def all_names() -> tuple[Name, ...]:
    """Every name that is relied on, fields of vLLM's configuration included."""
    return (*NAMES, *(option.name for option in OPTIONS), *SECTIONS)


def missing_in(source: Source, version: str, names: tuple[Name, ...]) -> tuple[Name, ...]:
    """Those of some names that a vLLM of that version should have and has not."""
    return tuple(
        name
        for name in names
        if name.is_in(version) and source.definition(name.module, name.path) is None
    )


@cache
def why_unavailable(feature: Feature) -> str | None:
    """Why the installed vLLM cannot serve a feature, and what to do; None if it can."""
    if feature == "dynamic strength" and is_active(REPORTS):
        return None  # it was looked up where the engine was configured
    names = tuple(name for name in all_names() if name.feature == feature)
    try:
        missing = missing_in(Source.of(INSTALLED), installed_version(), names)
    except SteerError as error:
        return str(error)
    if not missing:
        return None
    return f"vLLM {installed_version()} has no {', '.join(n.path for n in missing)}; {advice()}"
