"""The folder of a run: one process at a time has it, and a later one resumes what is in it."""

from vllm_steer.run_folder.lock import locked
from vllm_steer.run_folder.resumption import SETTINGS, RunFiles, open_with_settings, prepare

__all__ = ["SETTINGS", "RunFiles", "locked", "open_with_settings", "prepare"]
