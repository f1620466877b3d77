"""The middleware works without the parts of vLLM that only dynamic strength needs."""

import subprocess
import sys

import pytest

from vllm_steer.compat.names import names_of


@pytest.mark.parametrize(
    ("module", "name"),
    sorted(
        {
            (name.module, name.path.partition(".")[0])
            for name in names_of("dynamic strength")
            if name.module.startswith("vllm.v1.engine.output_processor")
        }
    ),
    ids=str,
)
def test_the_middleware_is_imported_without_dynamic_strength(module: str, name: str) -> None:
    code = f"import {module} as m; del m.{name}; import vllm_steer.serving.http.middleware"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
