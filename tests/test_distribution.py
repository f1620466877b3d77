"""A regular install holds everything that an editable one finds in the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.matrix
def test_a_wheel_holds_kernels_model_and_steers_and_works_from_any_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("vllm_steer-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "vllm_steer/py.typed",
        "vllm_steer/kernels/dispatch.py",
        "vllm_steer/kernels/guidance/triton_fused_kernels.py",
        "vllm_steer/kernels/lm_steer/torch_grouped.py",
        "vllm_steer/kernels/lm_steer/triton_tiled.py",
        "vllm_steer/embedded/model/model.safetensors",
        "vllm_steer/embedded/grammar/fr.yaml",
        "vllm_steer/embedded/steers/sentiment.safetensors",
        "vllm_steer/embedded/steers.yaml",
    } <= names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import vllm_steer, vllm_steer.bank;"
        "from vllm_steer import embedded, load_steer;"
        "print(vllm_steer.bank.__file__, load_steer(embedded.STEERS / 'sentiment.safetensors'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert str(site) in done.stdout
