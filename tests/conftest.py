"""Environment of all tests; it must be set before the first import of vLLM or triton.

``VLLM_STEER_TEST_RUNNER=v2`` runs the engine tests on vLLM's second model runner. On a machine
without a GPU its own Triton kernels then run in Triton's interpreter, which vLLM accepts as a
backend once one named "cpu" is registered.
"""

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from outside import REASON

RUNNER = os.environ.get("VLLM_STEER_TEST_RUNNER", "v1")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if RUNNER == "v2" else "0"

if RUNNER == "v2" and not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    _driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=_driver, compiler=None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run engines last: vLLM's Transformers backend permanently patches the Hugging Face class of
    the served model, and other tests need the original class.
    """
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report the tests that were skipped because files outside the repository are missing."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        str(report.longrepr[2]) for report in skipped if type(report.longrepr) is tuple
    )
    for reason, count in sorted(reasons.items()):
        if REASON in reason:
            terminalreporter.write_line(
                f"left out {count} tests: {reason.partition('Skipped: ')[2]}"
            )
