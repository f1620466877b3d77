"""The public Python API: each exported name exists, in order, with a docstring."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = ("doctor", "evaluation", "inspection", "sweep", "texts", "transfer")


def order(name: str) -> tuple[int, str]:
    """Constants first, then classes, then functions, each by name."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_are_sorted(package: str) -> None:
    names = import_module(f"vllm_steer.{package}").__all__
    assert names == sorted(names, key=order)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_exported_class_and_function_has_a_docstring(package: str) -> None:
    module = import_module(f"vllm_steer.{package}")
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            docstring = value.__doc__ or ""
            # A dataclass without a docstring gets its signature as one.
            assert docstring.strip() and not docstring.startswith(f"{name}("), name


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_documents_its_stable_names(package: str) -> None:
    docstring = import_module(f"vllm_steer.{package}").__doc__ or ""
    assert "``__all__`` follow the version number" in " ".join(docstring.split())
    assert "vllm-steer " in docstring


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("doctor", "examine"),
        ("evaluation", "compare"),
        ("evaluation", "evaluate"),
        ("sweep", "sweep"),
    ],
)
def test_the_function_of_a_command_is_exported(package: str, name: str) -> None:
    assert inspect.isfunction(getattr(import_module(f"vllm_steer.{package}"), name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'vllm_steer\.sweep' has no attribute 'Grid'"):
        import_module("vllm_steer.sweep").Grid  # noqa: B018


def test_importing_the_packages_of_lazy_names_imports_no_torch() -> None:
    code = "import sys, vllm_steer.evaluation, vllm_steer.sweep, vllm_steer.doctor\n"
    code += "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    line = [sys.executable, "-c", code]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip() == "[]"
