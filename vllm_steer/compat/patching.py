"""Wraps functions and methods of vLLM: one way for classes, modules and instances."""

import functools
from collections.abc import Callable
from typing import Any, Final

from vllm_steer.compat.names import NAMES
from vllm_steer.compat.versions import SUPPORTED, installed_version
from vllm_steer.compat.vllm_name import VllmName
from vllm_steer.errors import SteerError

_MARK: Final = "__vllm_steer__"
_WRAPPED: Final = {name.member: name for name in NAMES if name.use == "wrapped"}
_BY_OWNER: Final = {(name.owner, name.member): name for name in NAMES if name.use == "wrapped"}


def wrap(
    owner: Any, member: str, around: Callable[..., Any], *, once: bool = False, static: bool = False
) -> None:
    """Replace ``owner.member`` by a function that calls ``around(original, *args, **kwargs)``.

    With ``once`` a member that ``around`` wraps already stays as it is; ``static`` makes a static
    method of it. Raises ``SteerError`` if the owner has no such member.
    """
    name = _WRAPPED[member]  # what is not declared is not wrapped
    original = getattr(owner, member, None)
    if original is None:
        owner_name = getattr(owner, "__name__", "").rpartition(".")[2]
        raise SteerError(missing_name(_BY_OWNER.get((owner_name, member), name), owner))
    wrapped_by: tuple[Callable[..., Any], ...] = getattr(original, _MARK, ())
    if once and around in wrapped_by:
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    if once:
        setattr(wrapper, _MARK, (*wrapped_by, around))
    setattr(owner, member, staticmethod(wrapper) if static else wrapper)


def missing_name(name: VllmName, owner: Any = None) -> str:
    """The message for a name that this vLLM has not."""
    kind = type(owner).__name__ if owner is not None and not hasattr(owner, "__name__") else ""
    path = f"{kind}.{name.member}" if kind else name.path
    return (
        f"vLLM {installed_version()} has no {path}, which vllm-steer needs for {name.feature}"
        f"{f' ({name.why})' if name.why else ''}; {version_advice()}"
    )


def unknown_behavior(observation: str) -> str:
    """The error message for a vLLM that has all names and behaves differently."""
    return (
        f"vllm-steer: {observation}: vLLM {installed_version()} does not do what vllm-steer "
        f"relies on; {version_advice()}"
    )


def version_advice() -> str:
    """Advice for an unknown vLLM version."""
    return f"vllm-steer supports vLLM {SUPPORTED}: install one of these versions"
