"""Which features the installed vLLM can serve: those whose names it has."""

from functools import cache

from vllm_steer.compat.names import NAMES
from vllm_steer.compat.options import OPTIONS, SECTIONS
from vllm_steer.compat.patching import version_advice
from vllm_steer.compat.versions import installed_version
from vllm_steer.compat.vllm_name import Feature, VllmName
from vllm_steer.compat.vllm_source import INSTALLED, VllmSource
from vllm_steer.environment import STRENGTH_REPORTS, is_active
from vllm_steer.errors import SteerError


def all_names() -> tuple[VllmName, ...]:
    """Every name that is relied on, fields of vLLM's configuration included."""
    return (*NAMES, *(option.name for option in OPTIONS), *SECTIONS)


def missing_in(
    source: VllmSource, version: str, names: tuple[VllmName, ...]
) -> tuple[VllmName, ...]:
    """Those of some names that a vLLM of that version should have and has not."""
    return tuple(
        name
        for name in names
        if name.is_in(version) and source.definition(name.module, name.path) is None
    )


@cache
def unavailable_reason(feature: Feature) -> str | None:
    """The reason why the installed vLLM cannot serve a feature; None if it can."""
    if feature == "dynamic strength" and is_active(STRENGTH_REPORTS):
        return None  # it was looked up where the engine was configured
    names = tuple(name for name in all_names() if name.feature == feature)
    try:
        missing = missing_in(VllmSource.of(INSTALLED), installed_version(), names)
    except SteerError as error:
        return str(error)
    if not missing:
        return None
    return (
        f"vLLM {installed_version()} has no {', '.join(n.path for n in missing)}; "
        f"{version_advice()}"
    )
