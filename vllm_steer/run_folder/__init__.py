"""Run folders: locked by one process at a time, and resumed by later ones."""

from vllm_steer.run_folder.lock import locked
from vllm_steer.run_folder.resumption import SETTINGS, RunFiles, open_with_settings, prepare

__all__ = ["SETTINGS", "RunFiles", "locked", "open_with_settings", "prepare"]
