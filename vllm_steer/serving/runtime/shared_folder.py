"""The folder of what is loaded at run time, which all API servers of a server share.

It is made while vLLM parses its command line: before a process starts that is to know it.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from vllm_steer.environment import API_KEY, RUNTIME_FOLDER
from vllm_steer.errors import SteerError
from vllm_steer.runtime_config import RuntimeConfig


def prepare_server(runtime: RuntimeConfig) -> None:
    """Prepare what the API servers of a server share. Raises ``SteerError`` if it has no key."""
    if not runtime.enabled:
        return
    if not os.environ.get(API_KEY) and not runtime.unprotected:
        raise SteerError(
            f"runtime: changes need a key: set {API_KEY}, or runtime.unprotected: true if everybody"
            " who reaches the server may change what is loaded"
        )
    if runtime.state is None and RUNTIME_FOLDER not in os.environ:
        os.environ[RUNTIME_FOLDER] = str(_temporary_folder())


def folder_of(runtime: RuntimeConfig) -> Path:
    """The folder of an engine: the configured one, the server's, or a new one for this process."""
    shared = os.environ.get(RUNTIME_FOLDER)
    return runtime.state or (Path(shared) if shared else _temporary_folder())


def _temporary_folder() -> Path:
    """A folder for this user only, which is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-steer-"))
    process = os.getpid()
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        shutil.rmtree(folder, ignore_errors=True)
