"""``settings.json``: what a run was begun with, and the sign that a folder is a run's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vllm_steer.errors import SteerError
from vllm_steer.files.json_text import json_text
from vllm_steer.files.source import cause
from vllm_steer.files.whole import finished_name, write_text
from vllm_steer.foreign import listed
from vllm_steer.run_folder.lock import LOCK, unusable

SETTINGS: Final = "settings.json"
_SHOWN: Final = 3


def read_settings(folder: Path, made_by: str, files: tuple[str, ...]) -> Any:
    """The settings of the run in a folder; None where there is nothing, or no folder.

    Raises ``SteerError`` for a folder that holds anything without the settings of a run that was
    ``made_by`` the same: only ``files`` that a killed process was writing may be there.
    """
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise unusable(folder, error) from error
    except (ValueError, RecursionError) as error:
        raise SteerError(f"{path}: no JSON ({cause(error)}); give another folder") from None
    others = [name for name in names if name != LOCK and finished_name(name) not in files]
    if others and (not isinstance(found, dict) or found.get("made_by") != made_by):
        raise SteerError(
            f"run folder {folder} holds {listed(others[:_SHOWN])} and is no run's folder; give a "
            "new one, or an empty one"
        )
    return found


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, ``made_by`` among them; ``SteerError`` if that fails."""
    write_text(folder / SETTINGS, json_text(settings, indent=2) + "\n")
