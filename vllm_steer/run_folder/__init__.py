"""The folder of a run: one process at a time has it, and a later one resumes what is in it."""

from vllm_steer.run_folder.lock import locked
from vllm_steer.run_folder.resuming import RunFiles, prepare
from vllm_steer.run_folder.settings_file import read_settings, write_settings

__all__ = ["RunFiles", "locked", "prepare", "read_settings", "write_settings"]
