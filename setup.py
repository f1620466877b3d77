"""What goes into the distribution: the package, its kernels, its page and the embedded model.

Everything else about it is in ``pyproject.toml``.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=find_namespace_packages(include=["vllm_steer", "vllm_steer.*"]),
    package_data={
        "vllm_steer": ["py.typed"],
        "vllm_steer.embedded": ["**/*"],
        "vllm_steer.serving.http.playground": ["*.html", "*.css", "*.js"],
    },
)
