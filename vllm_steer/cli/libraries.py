"""The messages of vLLM, PyTorch, Transformers and their extensions, which a command shows with
--verbose only.
"""

import logging
import os
import warnings
from typing import Final

VERBOSE: Final = "--verbose"
_QUIET: Final = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # such as NUMA binding
    "TRANSFORMERS_VERBOSITY": "error",  # such as options of a generation config that are not used
    "HF_HUB_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",  # of processes that are started from here
}


def set_verbosity(is_verbose: bool) -> None:
    """Show or hide the messages of libraries; call it before they are imported.

    What the user has set in the environment stays as it is.
    """
    if is_verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
        return
    if "PYTHONWARNINGS" not in os.environ:
        warnings.simplefilter("ignore")
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        # vLLM logs before it sets its level, to Python's handler of last resort.
        logging.getLogger("vllm").setLevel(logging.ERROR)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
