"""Resumes a run with the settings it was started with, or discards it on request."""

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
    """The names of the files of a kind of run; ``texts/*.jsonl`` are all such files of a subfolder.

    ``work`` is deleted with the run, in this order: the file that identifies a run folder comes
    last, so that an interrupted deletion leaves a run folder. ``persistent`` files are kept.
    """

    work: tuple[str, ...]
    persistent: tuple[str, ...] = ()

    def discard(self, folder: Path) -> None:
        """Delete the work files, and no others."""
        for path, pattern in _pattern_folders(folder, self.work):
            for entry in list(os.scandir(path)):
                if fnmatchcase(entry.name, pattern):
                    os.unlink(entry.path)

    def remove_unfinished(self, folder: Path) -> None:
        """Delete the temporary files of a process that was killed."""
        for path, pattern in _pattern_folders(folder, (*self.work, *self.persistent)):
            remove_unfinished(path, partial(fnmatchcase, pat=pattern))


def open_with_settings(
    folder: Path, files: RunFiles, settings: Mapping[str, Any], *, begun: bool, restart: bool
) -> None:
    """``prepare`` for a run that stores its settings, including ``made_by``, in ``settings.json``.

    Also raises ``SteerError`` for a folder with other files and without such settings, since it is
    not a run folder.
    """
    previous = _read_settings(folder, files, settings["made_by"])
    if not prepare(folder, files, settings, previous, begun=begun, restart=restart):
        write_text(folder / SETTINGS, json_text(settings, indent=2) + "\n")


def prepare(
    folder: Path,
    files: RunFiles,
    settings: Mapping[str, Any],
    previous: Any,
    *,
    begun: bool = True,
    restart: bool = False,
) -> bool:
    """Prepare a folder for a run with ``settings``; whether there is a run to resume.

    ``previous`` are the settings of the run in the folder, or None. That run is discarded with
    ``restart``, and if its settings differ and it has no work yet (``begun`` False). Otherwise
    raises ``SteerError`` with the settings that differ; also for a folder that cannot be used.
    """
    differences = (
        [] if previous is None else list(_differences(previous, json.loads(json.dumps(settings))))
    )
    resumed = previous is not None and not restart and (begun or not differences)
    if resumed and differences:
        suffix = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise SteerError(
            f"run folder {folder} holds a run with other settings: "
            f"{'; '.join(differences[:_SHOWN])}{suffix}; give the same settings to resume it, "
            "another folder, or --restart (restart=True) to discard it"
        )
    try:
        for path, _ in _pattern_folders(folder, files.work):
            path.mkdir(parents=True, exist_ok=True)
        if not resumed:
            files.discard(folder)
        files.remove_unfinished(folder)
    except OSError as error:
        raise unusable(folder, error) from error
    return resumed


def _read_settings(folder: Path, files: RunFiles, made_by: str) -> Any:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise unusable(folder, error) from error
    except (ValueError, RecursionError) as error:
        raise SteerError(f"{path}: invalid JSON ({cause(error)}); give another folder") from None
    unexpected = [name for name in names if name != LOCK and finished_name(name) not in files.work]
    if unexpected and (not isinstance(settings, dict) or settings.get("made_by") != made_by):
        raise SteerError(
            f"run folder {folder} holds {listed(unexpected[:_SHOWN])} and is not a run folder; "
            "give a new one, or an empty one"
        )
    return settings


def _pattern_folders(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """The folder of each pattern, and the pattern of the names in it."""
    for pattern in patterns:
        subfolder, _, name = pattern.rpartition("/")
        yield folder / subfolder, name


def _differences(previous: Any, settings: Any, key_path: str = "") -> Iterator[str]:
    """Descriptions of the differences between two sets of settings."""
    if isinstance(previous, dict) and isinstance(settings, dict):
        for key in dict.fromkeys([*settings, *previous]):
            inner = f"{key_path}.{key}" if key_path else key
            yield from _differences(previous.get(key), settings.get(key), inner)
    elif previous != settings:
        if _is_digest(previous) and _is_digest(settings):
            yield f"different {named(key_path)}"
        else:
            yield f"{named(key_path)} was {shown(previous)} and is now {shown(settings)}"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
