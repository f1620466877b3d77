"""Foreign values as text: bounded, printable, on one line."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer.errors import SteerError
from vllm_steer.untrusted_text import LONGEST_MESSAGE, cut, listed, name, printable, shown


def shared(container: type, depth: int = 60) -> Any:
    value: Any = container()
    for _ in range(depth):
        value = container([value, value])
    return value


def endless(container: type) -> Any:
    value: Any = container()
    for _ in range(20_000):
        value = container([value])
    return value


class Hostile:
    def __repr__(self) -> str:
        raise AssertionError("a foreign repr was called")

    __str__ = __repr__


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (-3, "-3"),
        (1.5, "1.5"),
        (float("nan"), "nan"),
        ("it's", '"it\'s"'),
        ("a\x1b[31m\u202e\n", "'a\\x1b[31m\\u202e\\n'"),
        (b"\x00", "b'\\x00'"),
        (10**400, "a whole number of 401 digits"),
        (-(10**20), "a whole number of 21 digits"),
        (10**5000, "a whole number of about 5001 digits"),
        ([1, [2, [3]]], "[1, [2, [...]]]"),
        ({"a": {"b": {}}}, "{'a': {'b': {}}}"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, ...]"),
        (Path("/a\x07"), "'/a\\x07'"),
        (Hostile(), "a Hostile"),
        ([Hostile()], "[a Hostile]"),
        (torch.zeros(2, 3), "a tensor [2, 3] in torch.float32"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_shown_as_python_writes_it_or_named(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("value", [shared(tuple), shared(list), endless(tuple), "x" * 10**7])
def test_infinite_values_are_shown_at_once(value: Any) -> None:
    begun = time.process_time()
    assert len(shown(value)) <= 100
    assert time.process_time() - begun < 0.1


def test_letters_of_every_script_stay_and_controls_are_escaped() -> None:
    assert printable("Grüße, 日本語 😀") == "Grüße, 日本語 😀"
    assert printable("\x1b]8;;x\x07\u200b\ud800\x9b\r") == "\\x1b]8;;x\\x07\\u200b\\ud800\\x9b\\r"
    assert printable("a\nb\x07", lines=True) == "a\nb\\x07"
    assert printable("abcdef", 5) == "ab..."


@given(st.text(max_size=50))
def test_what_is_printable_was_not_changed(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    if text.isascii() and text.isprintable():
        assert printable(text) == text


@pytest.mark.parametrize("hidden", ["\u3164", "\u115f", "\u2800", "\u034f", "\ufe0f", "\U000e0101"])
def test_invisible_characters_are_escaped(hidden: str) -> None:
    assert printable(f"a{hidden}b") == f"a{hidden.encode('unicode_escape').decode()}b"
    assert shown(f"a{hidden}b") == repr(printable(f"a{hidden}b")).replace("\\\\", "\\")


def test_a_list_of_names_is_cut_to_fit() -> None:
    assert listed(["a", 3, None]) == "a, 3, None"
    assert listed([]) == "none"
    assert listed([], none="nothing") == "nothing"
    assert listed((f"n{i}" for i in range(1000)), 10) == "n0, n1, n2 and 997 more"
    assert listed(["b" * 300, "c"], 50) == f"{cut('b' * 300, 100)} and 1 more"
    assert name("a\x07") == "a\\x07"
    assert name((1,)) == "(1)"


def test_an_errors_message_is_one_printable_line_of_bounded_length() -> None:
    error = SteerError("found " + "\x1b[2J\n" * sys.maxunicode)
    assert len(str(error)) == LONGEST_MESSAGE
    assert str(error).isprintable()


def test_a_long_message_keeps_its_advice() -> None:
    message = str(SteerError("x" * 5000 + "\n: no such file; give another"))
    assert len(message) == LONGEST_MESSAGE
    assert message.startswith("xxx")
    assert message.endswith("\\n: no such file; give another")


@pytest.mark.parametrize("attributes", [{"shape": (2,), "dtype": "x" * 9000}, {"dtype": 1}])
def test_an_object_that_only_resembles_a_tensor_is_named_by_its_type(
    attributes: dict[str, Any],
) -> None:
    assert shown(SimpleNamespace(**attributes)) == "a SimpleNamespace"
    assert shown(torch.nn.Parameter(torch.ones(2, 3))) == "a tensor [2, 3] in torch.float32"
    assert shown(np.ones((2, 3))) == "a tensor [2, 3] in float64"
