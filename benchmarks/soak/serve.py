"""``vllm``, also with its second model runner on a CPU: ``python serve.py serve MODEL ...``.

That runner's own kernels are Triton's. Without a GPU they run in Triton's interpreter, which vLLM
accepts as a backend once one is registered under the name "cpu"; in each process of the server.
"""

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends

    _driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=_driver, compiler=None)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
