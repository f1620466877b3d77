"""``python -m benchmarks.architectures.run``: one line per architecture of vLLM's registry.

Each architecture has a process of its own, forked from this one, which has only imported modules.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.result import Result

_SECONDS: Final = 180
DEFAULT: Final = Path(__file__).parents[1] / "results" / "cpu-architectures.json"


def generating_architectures() -> list[str]:
    """The architectures of vLLM's registry that generate text."""
    from vllm.model_executor.models import registry

    tables = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
    return sorted({name for table in tables for name in getattr(registry, table)})


def _in_a_process(architecture: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{architecture}.json"
    log = (folder / f"{architecture}.log").open("wb")
    child = os.fork()
    if child == 0:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        from benchmarks.architectures.verdict import verdict_of

        path.write_text(json.dumps(verdict_of(architecture)))
        os._exit(0)
    deadline = time.monotonic() + _SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.2)
    log.close()
    if path.exists():
        line: dict[str, Any] = json.loads(path.read_text())
        return line
    reason = "the process ended without an answer"
    return {"architecture": architecture, "state": "not started", "reason": reason}


def main() -> None:
    """Write the results; with ``--resume`` lines that compare a model in an earlier run stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", help="default: all of vLLM's registry")
    parser.add_argument("--json", type=Path, default=DEFAULT, help="the result file")
    parser.add_argument("--logs", type=Path, default=Path("build/architectures"), help="a folder")
    parser.add_argument("--resume", action="store_true", help="keep lines that compare a model")
    args = parser.parse_args()
    os.environ |= {
        "VLLM_STEER_SELF_TEST": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MLA_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    import transformers  # noqa: F401
    import vllm  # noqa: F401

    args.logs.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(args.json.read_text())["rows"] if args.resume else []
    result = Result("architectures", args.json)
    done = {line["architecture"]: line for line in earlier if "resid" in line.get("compared", {})}
    for architecture in args.architectures or generating_architectures():
        line = done.get(architecture) or _in_a_process(architecture, args.logs)
        result.add(line, f"{architecture}: {line['state']} {line.get('reason', '')}"[:150])


if __name__ == "__main__":
    sys.exit(main())
