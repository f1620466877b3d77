"""The text of a config: unambiguous, of bounded size, with the numbers of YAML 1.2."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_steer import SteerConfig, SteerError
from vllm_steer.config_text import LARGEST, read_config_file, read_config_text

NESTED_MERGE = "a: &a {y: 3}\nm: &m {<<: *a, x: 1}\nn: &n {y: 2}\nc: {<<: [*m, *n]}"


def values(texts: Any) -> Any:
    return st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**18), 10**18)
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=12,
    )


PLAIN = values(st.text(max_size=8))
WORDS = values(
    st.text(
        st.characters(exclude_characters="0123456789\x85\u2028\u2029", exclude_categories=["Cs"]),
        max_size=8,
    )
)
"""Without digits and other breaks: YAML 1.1 and 1.2 do not agree on what is a number, or a line."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 2026-01-01", "2026-01-01"),
        ("a: 1_0", "1_0"),
        ("a: 0x10", "0x10"),
        ("a: 1:30", "1:30"),
        ("a: 010", "010"),
        ("a: 0", 0),
        ("a: -12", -12),
        ("a: 1e3", 1000.0),
        ("a: 1.5e-3", 0.0015),
        ("a: .5", 0.5),
        ("a: 7.", 7.0),
        ("a: .inf", math.inf),
        ("a: '1'", "1"),
        ("\ufeffa: 1", 1),
        ("x: &x {b: 1}\na: {<<: *x}", {"b": 1}),
        ("x: &x {b: 1, c: 1}\na: {<<: *x, c: 2}", {"b": 1, "c": 2}),
        ("x: &x {b: 1}\ny: &y {c: 2}\na: {<<: [*x, *y]}", {"b": 1, "c": 2}),
        ("a: !!str 1", "1"),
        ('a: "\\N\\L\\P"', "\x85\u2028\u2029"),
        ('{"a": "\\ud83d\\ude00"}', "\U0001f600"),
        ("a: !!int 1", 1),
        ("a: !!map {b: 1}", {"b": 1}),
        ("'yes': 1\na: 2", 2),
        ("x: &x [1, 2]\na: [*x, *x]", [[1, 2], [1, 2]]),
    ],
)
def test_values_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_config_file(path, "c")["a"] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"c: line 3: the key 'a' is given twice"),
        ("a: {b: 1, 'b': 2}", r"c: line 1: the key 'b' is given twice"),
        ('{"a": 1, "\\u0061": 2}', "c: the key 'a' is given twice"),
        ("{a: 1, a: 2}", "c: line 1: the key 'a' is given twice"),
        ("a: &x [*x]", "c: line 1: an alias holds itself"),
        ("[" * 40 + "]" * 40, "c is nested more than 32 deep"),
        ("[" * 9000, "c is nested more than 32 deep"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "c is nested more than 32 deep"),
        ("? [1]\n: 2", "c: line 1: a key is a list or a mapping; expected a text"),
        ("a: [", "c is neither YAML nor JSON: line 1, column 5: expected the node content"),
        ("a: !!python/name:os.system x", "c: line 1: the tag 'tag:yaml.org,2002:python/name:os"),
        ("a: !!binary aGk=", "the tag 'tag:yaml.org,2002:binary'; expected plain values"),
        ("a: !!bool x", "the tag 'tag:yaml.org,2002:bool'; expected plain values"),
        ('a: !!int "0x2"', "the tag 'tag:yaml.org,2002:int'; expected plain values"),
        ("a: !!int 1_0", "the tag 'tag:yaml.org,2002:int'; expected plain values"),
        ("a: !!float 1:30", "the tag 'tag:yaml.org,2002:float'; expected plain values"),
        ("a: !!null 2", "the tag 'tag:yaml.org,2002:null'; expected plain values"),
        ("a: !!seq {b: 1}", "the tag 'tag:yaml.org,2002:seq'; expected plain values"),
        ("a: {!!merge b: {c: 1}}", "the tag 'tag:yaml.org,2002:merge'"),
        ("yes: 1", "c: line 1: the key 'yes' is no text; put it in quotes"),
        ("a: 1\n? 2\n: 3", "c: line 2: the key '2' is no text; put it in quotes"),
        ("~: 1", "c: line 1: the key '~' is no text; put it in quotes"),
        ("x: &x {b: 1}\ny: &y {b: 2}\na:\n  <<: [*x, *y]", "line 2: the key 'b' is given twice"),
        (
            "a: 1\n# b\x85c: 2",
            r"c: line 2: the character \\x85, which ends a line for some readers",
        ),
        ("a: 1 # \u2028b: 2", r"c: line 1: the character \\u2028"),
        ("a: x\u2029b: 2", r"c: line 1: the character \\u2029"),
        ('a: "\\ud83d\\ude00"', "c: line 1: .* has letters that are not Unicode"),
        ('{"a": "\\ud83d"}', "c: a string has characters that are not valid Unicode"),
        (NESTED_MERGE, "c: line 3: the key 'y' is given twice"),
        ('{"a": 1e999}', "c: the number '1e999' is too large"),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "c: line 1: the key '<<' is given twice"),
        ('{"a": NaN}', "c: NaN is not a JSON number"),
        ('{"a": 1' + "0" * 400 + "}", "c: a whole number of 401 digits; at most 20 are read"),
    ],
    ids=range(33),
)
def test_an_ambiguous_or_incomplete_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        read_config_text(text, "c")


def test_aliases_count_once_per_use() -> None:
    lines = ["x0: &x0 [lol, lol]"]
    lines += [f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40)]
    with pytest.raises(SteerError, match="c: line 16: more than 100000 values"):
        read_config_text("\n".join(lines), "c")
    parsed = read_config_text("\n".join(lines[:10]), "c")
    assert parsed["x1"] == [["lol", "lol"], ["lol", "lol"]]


def test_a_large_file_and_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("#" * (LARGEST + 1))
    with pytest.raises(SteerError, match=f"is larger than {LARGEST} bytes"):
        SteerConfig.load(path)
    path.write_bytes("steers: {}".encode("utf-16"))
    with pytest.raises(SteerError, match=r"it is not UTF-8 .*save it as UTF-8"):
        SteerConfig.load(path)


def test_a_config_given_as_a_dict_is_bounded_too() -> None:
    shared: Any = ("a",)
    for _ in range(60):
        shared = (shared, shared)
    itself: dict[str, Any] = {}
    itself["steers"] = itself
    for config in ({"steers": {"a": {"path": "x", "description": shared}}}, itself):
        with pytest.raises(SteerError, match=r"steer config (holds more|is nested)"):
            SteerConfig.load(config)


@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=4))
def test_json_is_read_as_json(value: Any) -> None:
    assert read_config_text(json.dumps(value), "c") == value
    assert read_config_text(" \n" + json.dumps(value, ensure_ascii=False, indent=1), "c") == value


@given(WORDS)
def test_what_yaml_writes_is_read_as_pyyaml_reads_it(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert read_config_text(text, "c") == yaml.safe_load(text)


@given(st.text(max_size=200) | st.text(alphabet="a:{}[],&*!|>'\"%@#-? \n\t01.<\\", max_size=60))
@settings(max_examples=500)
def test_any_text_gives_values_or_a_one_line_error(text: str) -> None:
    try:
        read_config_text(text, "c")
    except SteerError as error:
        assert str(error).isprintable()


@given(st.dictionaries(st.sampled_from(["steers", "presets", "default", "limits", "x"]), PLAIN))
@settings(max_examples=300)
def test_any_values_give_a_config_or_a_one_line_error(value: Any) -> None:
    try:
        SteerConfig.load(value)
    except SteerError as error:
        assert str(error).isprintable()
