"""Make a folder with everything that ``run.py`` needs on a machine without network access.

    python -m benchmarks.card.pack PACK [--vllm FILE]

It holds: the package as a wheel installs it, with its entry points; the benchmarks and the GPU
tests; a tiny model, its steers and references in float64; pytest and rich, which the machine may
lack; and with ``--vllm`` an archive (``tar.xz``) of vLLM and its dependencies, unpacked on the
machine. The total is under 60 MiB. The machine needs Python 3.11 or newer, torch, triton,
transformers, and vLLM if no archive is given.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import describe_commit, describe_versions

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MIB = 60
EXTRA = (
    *("pytest", "pytest-timeout", "pytest-xdist", "pluggy", "iniconfig", "execnet"),
    *("rich", "markdown-it-py", "mdurl", "pygments"),
)
TESTS = ("conftest.py", "outside.py", "lm_steer_cases.py", "triton")


def main() -> None:
    """Make the pack; refuse one that is too large."""
    args = _arguments()
    pack: Path = args.pack
    if pack.exists() and any(pack.iterdir()):
        sys.exit(f"{pack} is not empty; name a folder that is, or is not there yet")
    pack.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pack-") as folder:
        _install(
            "--no-build-isolation", "--target", str(pack / "site"), str(_sources(Path(folder)))
        )
    if not args.dry:
        _install("--target", str(pack / "extra"), *EXTRA)
    for name in TESTS:
        _copy(ROOT / "tests" / name, pack / "tests" / name)
    _copy(ROOT / "benchmarks", pack / "benchmarks")
    _write_references(pack, dry=args.dry)
    if args.vllm is not None:
        shutil.copyfile(args.vllm, pack / "vllm.tar.xz")
    facts = {
        "git": describe_commit(),
        "versions": describe_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "vllm_archive": args.vllm is not None,
    }
    (pack / "made.json").write_text(json.dumps(facts, indent=1) + "\n")
    (pack / "benchmarks" / "commit.json").write_text(json.dumps(facts["git"]) + "\n")
    size = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()) / 2**20
    if size > LIMIT_MIB:
        sys.exit(f"{pack} has {size:.1f} MiB; {LIMIT_MIB} can be carried")
    print(f"{pack}: {size:.1f} MiB")


def _sources(folder: Path) -> Path:
    """A copy of the sources of the wheel: a build leaves files beside its sources and reuses those
    of an earlier build.
    """
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "vllm_steer"):
        _copy(ROOT / name, folder / name)
    return folder


def _install(*options: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    process = subprocess.run([*pip, "--no-deps", "--no-compile", *options], cwd=ROOT)
    if process.returncode:
        sys.exit(process.returncode)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target)
        return
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(source, target, ignore=ignored)


def _write_references(pack: Path, *, dry: bool) -> None:
    """Write the references in a separate process, on one thread: several threads slow tiny products
    down.
    """
    sizes = (True,) if dry else (True, False)
    calls = [
        f"references.write(Path({str(pack / (few * 'few-' + name))!r}), few={few}, "
        f"reading={name == 'reading'})"
        for few in sizes
        for name in ("engine", "reading")
    ]
    code = "; ".join(
        [
            "import torch; from pathlib import Path; torch.set_num_threads(1)",
            "from benchmarks.card import references",
            *calls,
        ]
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    if process.returncode:
        sys.exit(process.returncode)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path, metavar="PACK", help="folder to make")
    parser.add_argument("--vllm", type=Path, metavar="FILE", help="archive of vLLM, tar.xz")
    parser.add_argument(
        "--dry", action="store_true", help="for a dry run here: few references, no extra packages"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
