"""Whether an interpreter can run a peer that comes as a package, and if not, why."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROBE = """
import importlib.util, json, sys
names = (sys.argv[1], "vllm", "torch")
found = {name: importlib.util.find_spec(name) is not None for name in names}
cuda = False
if found["torch"]:
    import torch
    cuda = torch.cuda.is_available()
print(json.dumps({"python": sys.version_info[:2], "found": found, "cuda": cuda}))
"""


@dataclass(frozen=True)
class Package:
    """What a peer's package is called and what its metadata and its code ask for."""

    distribution: str
    module: str
    python: tuple[int, int]
    cuda: bool


PACKAGES = {
    "hotwire-vllm": Package("hotwire-vllm", "hotwire", python=(3, 10), cuda=True),
    "vllm-lens": Package("vllm-lens", "vllm_lens", python=(3, 12), cuda=True),
}


def reason_against(peer: str, interpreter: str) -> str | None:
    """Why ``interpreter`` cannot run ``peer``, all reasons in one line; None if it can try."""
    package = PACKAGES[peer]
    try:
        done = subprocess.run(
            [interpreter, "-c", PROBE, package.module], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"the interpreter {Path(interpreter).name} does not run: {type(error).__name__}"
    return describe_lack(package, json.loads(done.stdout.splitlines()[-1]))


def describe_lack(package: Package, probed: dict[str, object]) -> str | None:
    """The reasons in what the probe printed; None without one."""
    python, found = tuple(probed["python"]), probed["found"]
    modules = ((package.module, package.distribution), ("vllm", "vllm"))
    reasons = [
        f"{distribution} is not installed in this Python"
        for module, distribution in modules
        if not found[module]
    ]
    if python < package.python:
        wanted, given = (".".join(map(str, version)) for version in (package.python, python))
        reasons.append(f"it needs Python {wanted}, this is {given}")
    if package.cuda and not probed["cuda"]:
        reasons.append("no CUDA device is there")
    return "; ".join(reasons) or None
