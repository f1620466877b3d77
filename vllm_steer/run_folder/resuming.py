"""Resumes a run under the settings that it began with, or discards it on request."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import SteerError, cause
from vllm_steer.files.atomic_write import finished_name, remove_unfinished, write_text
from vllm_steer.files.json_text import json_text
from vllm_steer.run_folder.lock import LOCK, unusable
from vllm_steer.untrusted_text import listed, shown
from vllm_steer.untrusted_text import name as named

SETTINGS: Final = "settings.json"
_SHOWN: Final = 3
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RunFiles:
    """The names of the files that a kind of run writes; ``texts/*.jsonl`` are all of a subfolder.

    ``work`` is discarded with the run, in this order: a file that tells a run's folder from others
    comes last, so that what is left after a kill is still a run's folder. ``kept`` stays.
    """

    work: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def discard(self, folder: Path) -> None:
        """Remove the work, and nothing else."""
        for place, pattern in _places(folder, self.work):
            for entry in list(os.scandir(place)):
                if fnmatchcase(entry.name, pattern):
                    os.unlink(entry.path)

    def clear_unfinished(self, folder: Path) -> None:
        """Remove what a killed process was writing."""
        for place, pattern in _places(folder, (*self.work, *self.kept)):
            remove_unfinished(place, partial(fnmatchcase, pat=pattern))


def open_with_settings(
    folder: Path, files: RunFiles, asked: Mapping[str, Any], *, begun: bool, restart: bool
) -> None:
    """``prepare`` for a run that keeps its settings, ``made_by`` among them, in ``settings.json``.

    Raises ``SteerError`` as well for a folder that holds anything without such settings: they are
    the sign that it is a run's.
    """
    found = _read_settings(folder, files, asked["made_by"])
    if not prepare(folder, files, asked, found, begun=begun, restart=restart):
        write_text(folder / SETTINGS, json_text(asked, indent=2) + "\n")


def prepare(
    folder: Path,
    files: RunFiles,
    asked: Mapping[str, Any],
    found: Any,
    *,
    begun: bool = True,
    restart: bool = False,
) -> bool:
    """Make a folder ready for a run with the settings ``asked``; whether there is one to resume.

    ``found`` are the settings of the run that is there, or None. That run is discarded for
    ``restart``, and where it has other settings and no work to lose (not ``begun``). Raises
    ``SteerError`` naming the settings that differ otherwise, and for a folder that cannot be used.
    """
    other = [] if found is None else list(_differences(found, json.loads(json.dumps(asked))))
    resumed = found is not None and not restart and (begun or not other)
    if resumed and other:
        more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        raise SteerError(
            f"run folder {folder} holds a run with other settings: {'; '.join(other[:_SHOWN])}"
            f"{more}; give the same settings to resume it, another folder, or --restart "
            "(restart=True) to discard it"
        )
    try:
        for place, _ in _places(folder, files.work):
            place.mkdir(parents=True, exist_ok=True)
        if not resumed:
            files.discard(folder)
        files.clear_unfinished(folder)
    except OSError as error:
        raise unusable(folder, error) from error
    return resumed


def _read_settings(folder: Path, files: RunFiles, made_by: str) -> Any:
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise unusable(folder, error) from error
    except (ValueError, RecursionError) as error:
        raise SteerError(f"{path}: no JSON ({cause(error)}); give another folder") from None
    others = [name for name in names if name != LOCK and finished_name(name) not in files.work]
    if others and (not isinstance(found, dict) or found.get("made_by") != made_by):
        raise SteerError(
            f"run folder {folder} holds {listed(others[:_SHOWN])} and is no run's folder; give a "
            "new one, or an empty one"
        )
    return found


def _places(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """The folder of each pattern, and the pattern of the names in it."""
    for pattern in patterns:
        place, _, name = pattern.rpartition("/")
        yield folder / place, name


def _differences(found: Any, asked: Any, place: str = "") -> Iterator[str]:
    """Where two sets of settings differ, in words."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*asked, *found]):
            inner = f"{place}.{key}" if place else key
            yield from _differences(found.get(key), asked.get(key), inner)
    elif found != asked:
        if _is_digest(found) and _is_digest(asked):
            yield f"different {named(place)}"
        else:
            yield f"{named(place)} was {shown(found)} and is now {shown(asked)}"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
