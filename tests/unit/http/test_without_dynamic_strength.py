"""The middleware needs nothing of vLLM that dynamic strength alone needs."""

import subprocess
import sys

from vllm_steer.compat.names import names_of

OUTPUTS = "vllm.v1.engine.output_processor"


def test_the_middleware_is_imported_without_it() -> None:
    classes = {
        name.path.partition(".")[0]
        for name in names_of("dynamic strength")
        if name.module == OUTPUTS
    }
    assert classes
    code = [f"import {OUTPUTS} as outputs", *(f"del outputs.{name}" for name in sorted(classes))]
    code.append("import vllm_steer.serving.http.middleware")
    completed = subprocess.run(
        [sys.executable, "-c", "; ".join(code)], capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
