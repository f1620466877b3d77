"""A steer from a path or from bytes: checked, and stored by its content for the workers to read."""

import base64
import binascii
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from vllm_steer.config import LONGEST_NAME, NAME, NO_STEER, Limits, SteerEntry
from vllm_steer.errors import SteerError
from vllm_steer.files import save_steer
from vllm_steer.files.sae_feature import CONFIG_NAME
from vllm_steer.files.steer_metadata import describe_errors
from vllm_steer.planned_steer import PlannedSteer, load_entry, plan_loaded
from vllm_steer.runtime.background import rest
from vllm_steer.runtime.refusal import BAD_REQUEST, NO_RIGHT, NOT_FOUND, TOO_LARGE, Refused
from vllm_steer.untrusted_text import shown

SUFFIX: Final = ".safetensors"
UPLOAD: Final = ".upload-"


def check_name(name: Any) -> str:
    """A name that a steer can have. Raises ``Refused`` for any other value."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise Refused(
            f"{shown(name)} cannot be a steer's name: letters, digits, '_', '.', '-' are allowed, "
            f"at most {LONGEST_NAME}",
            BAD_REQUEST,
        )
    if name == NO_STEER:
        raise Refused(f"{NO_STEER!r} means no steer; choose another name", BAD_REQUEST)
    return name


def path_in(folders: Sequence[Path], path: Any, *, with_config: bool = False) -> Path:
    """A path of a request as an absolute one. Raises ``Refused`` for one outside ``folders``.

    Links are followed for that and kept, as the cache of a model hub has links of the names that
    files are read by. ``with_config``: the file is read with a ``cfg.json`` beside it.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise Refused(f"steer_path is {shown(path)}; expected a path", BAD_REQUEST)
    try:
        resolved = Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise Refused(f"steer_path {shown(path)} cannot be a path: {error}", BAD_REQUEST) from None
    allowed = ", ".join(map(str, folders)) or "none"
    if not _is_in(folders, resolved):
        raise Refused(
            f"steer_path {shown(path)} is outside the allowed folders; runtime.folders: {allowed}",
            NO_RIGHT,
        )
    if not os.path.isfile(resolved):
        raise Refused(f"steer_path {shown(path)}: no such file", NOT_FOUND)
    given = Path(path).absolute()
    beside = given.parent / CONFIG_NAME
    if with_config and os.path.isfile(beside) and not _is_in(folders, beside.resolve()):
        raise Refused(
            f"steer_path {shown(path)}: {CONFIG_NAME} beside it leads out of the allowed folders; "
            f"runtime.folders: {allowed}",
            NO_RIGHT,
        )
    return given


def _is_in(folders: Sequence[Path], path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def decoded(data: Any, field: str, most: int) -> bytes:
    """The bytes of a file in base64, at most ``most`` of them. Raises ``Refused`` otherwise."""
    if most == 0:
        raise Refused(
            f"{field}: this server takes no files over HTTP (runtime.upload_mib is 0)", NO_RIGHT
        )
    if not isinstance(data, str):
        raise Refused(f"{field} is {shown(data)}; expected a file in base64", BAD_REQUEST)
    if len(data) // 4 * 3 > most + 2:
        raise Refused(
            f"{field} has about {len(data) // 4 * 3} bytes; at most {most} are allowed "
            "(runtime.upload_mib)",
            TOO_LARGE,
        )
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{field} is not base64 ({error})", BAD_REQUEST) from None
    if len(content) > most:
        raise Refused(
            f"{field} has {len(content)} bytes; at most {most} are allowed (runtime.upload_mib)",
            TOO_LARGE,
        )
    return content


def store(
    name: str, source: Path | bytes, options: Mapping[str, Any], limits: Limits, folder: Path
) -> PlannedSteer:
    """Check a steer and store it in ``folder``, in a file of its own; the stored steer, with a key.

    ``options`` are the keys of a steer in a config. Raises ``Refused`` for a steer that they do not
    fit or that is beyond the limits.
    """
    if isinstance(source, bytes):
        with tempfile.NamedTemporaryFile(dir=folder, prefix=UPLOAD) as file:
            file.write(source)
            file.flush()
            return _store(name, Path(file.name), options, limits, folder)
    return _store(name, source, options, limits, folder)


def _store(
    name: str, path: Path, options: Mapping[str, Any], limits: Limits, folder: Path
) -> PlannedSteer:
    try:
        entry = SteerEntry.model_validate({**options, "path": path})
    except ValidationError as error:
        raise Refused(describe_errors(error, f"steer {name}"), BAD_REQUEST) from None
    try:
        steer = load_entry(name, entry)
        rest()
        planned = plan_loaded(name, entry, steer, limits)
        rest()
        stored = folder / f"{planned.content}-{secrets.token_hex(8)}{SUFFIX}"
        save_steer(steer, stored)
        rest()
    except SteerError as error:
        raise Refused(str(error).replace(f"{path}", "the file")) from None
    return planned.model_copy(update={"path": stored, "overrides": {}}).as_loaded
