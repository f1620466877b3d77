"""One name of vLLM that vllm-steer relies on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

Use = Literal["wrapped", "subclassed", "called", "read", "written"]
Feature = Literal[
    "steering",
    "guidance",
    "offset steers",
    "prompt logprobs",
    "dynamic strength",
    "HTTP",
    "loading at run time",
    "LoRA",
    "metrics",
    "command line tools",
]
"""What is lost without a name. ``steering`` is what every steered engine needs."""


@dataclass(frozen=True)
class VllmName:
    """One name: ``path`` is ``function``, ``Class`` or ``Class.member`` in ``module``.

    since    the first version that has it, None: the oldest supported one
    until    the first version that has it no longer, None: there is none
    process  where a wrapped name acts
    """

    module: str
    path: str
    use: Use
    feature: Feature
    why: str = ""
    process: str = ""
    since: str | None = None
    until: str | None = None

    @property
    def owner(self) -> str:
        """The class, or the module of a function."""
        return self.path.partition(".")[0] if "." in self.path else self.module.rpartition(".")[2]

    @property
    def member(self) -> str:
        """The last part of the name."""
        return self.path.rpartition(".")[2]

    def is_in(self, version: str) -> bool:
        """Whether every vLLM of that version has it.

        A build from between two releases may be like the one before or the one after it, and one
        without a version like any: what not all of these have may be missing.
        """
        try:
            parsed = Version(version)
        except InvalidVersion:
            return self.since is None and self.until is None
        releases = [Version(parsed.base_version)]
        if parsed.is_prerelease:
            releases.append(Version(f"{parsed.major}.{parsed.minor + 1}"))
        return all(self._is_between(release) for release in releases)

    def _is_between(self, version: Version) -> bool:
        after = self.since is None or version >= Version(self.since)
        return after and (self.until is None or version < Version(self.until))


def vllm_names(
    location: str, members: str, use: Use, feature: Feature, why: str = "", **more: Any
) -> Iterator[VllmName]:
    """Names that are used alike: ``members``, separated by spaces, of ``module`` or
    ``module:Class``.
    """
    module, _, owner = location.partition(":")
    for member in members.split():
        yield VllmName(module, f"{owner}.{member}" if owner else member, use, feature, why, **more)
