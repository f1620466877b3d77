"""Checks of the installation, and of whether vLLM will load the plugin."""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch

from vllm_steer.compat.versions import SUPPORTED, is_supported
from vllm_steer.doctor.finding import Finding, State
from vllm_steer.environment import DISABLE, is_disabled
from vllm_steer.kernels.dispatch import KernelError, resolve_kernels

PART = "environment"
_GROUP = "vllm.general_plugins"
_ENTRY = "vllm_steer.plugin:register"


def environment() -> Iterator[Finding]:
    """Findings on the versions, the plugin, the device and the kernels that ``auto`` selects."""
    yield _vllm()
    for package in ("torch", "transformers", "triton"):
        installed = _version(package)
        yield Finding(PART, package, "-" if installed else "missing", installed or "not installed")
    yield _plugin()
    yield from _device()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _vllm() -> Finding:
    installed = _version("vllm")
    supported = f"vllm-steer supports {SUPPORTED}"
    if installed is None:
        return Finding(PART, "vllm", "FAILED", f"not installed; {supported}")
    if not is_supported(installed):
        return Finding(
            PART, "vllm", "warning", f"{installed} is outside the supported range; {supported}"
        )
    return Finding(PART, "vllm", "ok", f"{installed} ({supported})")


def _plugin() -> Finding:
    state, message = _plugin_state()
    return Finding(PART, "plugin", state, message)


def _plugin_state() -> tuple[State, str]:
    """Whether vLLM's processes will load the plugin; vLLM itself reads both variables."""
    names = [entry.name for entry in entry_points(group=_GROUP) if entry.value == _ENTRY]
    if not names:
        return "FAILED", f"no entry point in {_GROUP}; install vllm-steer beside this vLLM"
    if is_disabled():
        return "FAILED", f"switched off by {DISABLE}={os.environ[DISABLE]}; unset it"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and names[0] not in allowed.split(","):
        return "FAILED", f"VLLM_PLUGINS={allowed} does not include {names[0]}; add it"
    return "ok", f"installed and active, entry point {names[0]}"


def _device() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, no CUDA device"
    yield Finding(PART, "device", "-", name)
    try:
        kernels = resolve_kernels("auto", device)
    except KernelError as error:
        yield Finding(PART, "kernels", "FAILED", str(error))
    else:
        yield Finding(PART, "kernels", "-", f"auto selects {kernels}", {"auto": kernels})
