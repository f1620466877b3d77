"""Distribution of vllm-steer: the package, its kernels, the embedded model and the plugin entry."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "vllm_steer/version.py").read_text())[1]
# Fitting probes, judging texts and plotting: nothing that serves needs them.
EVAL = ["scikit-learn", "scipy", "matplotlib", "langdetect"]

setup(
    name="vllm-steer",
    version=VERSION,
    description="Steer a language model per request while vLLM serves it",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["vllm_steer", "vllm_steer.*"]),
    package_data={"vllm_steer": ["py.typed"], "vllm_steer.embedded": ["**/*"]},
    install_requires=[
        "vllm>=0.25.1",
        "torch",
        "transformers",
        "safetensors",
        "gguf",
        "msgspec",
        "triton; platform_system == 'Linux'",
        "numpy",
        "prometheus-client",
        "pydantic>=2.9",
        "PyYAML",
        "typer",
        "rich",
    ],
    extras_require={
        "demo": ["openai", "httpx"],
        "eval": EVAL,
        "test": [
            *EVAL,
            "openai",
            "httpx",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "peft",
            "ruff",
            "mypy",
            "types-PyYAML",
            "import-linter",
        ],
    },
    entry_points={
        "console_scripts": ["vllm-steer = vllm_steer.cli:main"],
        "vllm.general_plugins": ["steer = vllm_steer.plugin:register"],
    },
)
