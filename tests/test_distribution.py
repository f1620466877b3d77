"""The wheel and the source distribution hold all that the package needs, and install."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from vllm_steer.version import __version__

ROOT = Path(__file__).parents[1]
FILES = {
    "vllm_steer/py.typed",
    "vllm_steer/kernels/dispatch.py",
    "vllm_steer/kernels/guidance/triton_fused_kernels.py",
    "vllm_steer/kernels/lm_steer/torch_grouped.py",
    "vllm_steer/kernels/lm_steer/triton_tiled.py",
    "vllm_steer/embedded/model/model.safetensors",
    "vllm_steer/embedded/grammar/fr.yaml",
    "vllm_steer/embedded/steers/sentiment.safetensors",
    "vllm_steer/embedded/steers.yaml",
    "vllm_steer/serving/http/playground/page.html",
    "vllm_steer/serving/http/playground/palette.css",
    "vllm_steer/serving/http/playground/main.js",
}
PROGRAM = """
from importlib.metadata import entry_points
import vllm_steer.bank
from vllm_steer import embedded, load_steer
from vllm_steer.kernels.lm_steer import lm_steer
(point, *_) = entry_points(group="vllm.general_plugins", name="steer")
print(vllm_steer.bank.__file__, point.value, load_steer(embedded.STEERS / "sentiment.safetensors"))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ".", cwd=ROOT)
    return folder


@pytest.mark.matrix
def test_both_distributions_hold_kernels_model_and_steers_with_valid_metadata(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    assert in_wheel >= FILES and in_source >= FILES
    assert {"docs/quickstart.md", "mkdocs.yml", "README.md", "SECURITY.md"} <= in_source
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in in_wheel)
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, source, cwd=built)


@pytest.mark.matrix
@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"], ids=["wheel", "source"])
def test_installed_it_works_from_any_folder(built: Path, pattern: str, tmp_path: Path) -> None:
    """In an environment that has nothing else; its dependencies are those of this one."""
    (distribution,) = built.glob(pattern)
    folder = tmp_path / "environment"
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (here,) = (path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(here, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder]
    run(*pip, "install", "-q", "--no-deps", "--no-build-isolation", distribution, cwd=tmp_path)
    output = run(folder / "bin" / "python", "-c", PROGRAM, cwd=tmp_path)
    assert str(site) in output and "vllm_steer.plugin:register" in output
    assert f"vllm-steer {__version__}" in run(
        folder / "bin" / "vllm-steer", "--version", cwd=tmp_path
    )
