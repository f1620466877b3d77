"""Limits of the size of a request's value, and values that cannot be sent to an engine."""

import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from http_tools import PLAN
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_steer import SteerRequestError
from vllm_steer.request import resolve
from vllm_steer.request.value_limits import MAX_CHARACTERS, MAX_OPTIONS, MAX_PARTS
from vllm_steer.serving.admission import admit, admit_and_set_cache_key
from vllm_steer.serving.request_args import RejectedSteer


@pytest.fixture
def plan(make_plan: Any) -> Any:
    return make_plan({"a": 1.0, "b": 2.0}, max_steers_per_request=4)


def endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["a"] = value
    return value


def shared(levels: int, width: int = 2) -> Any:
    value: Any = ()
    for _ in range(levels):
        value = (value,) * width
    return value


def wide() -> dict[str, Any]:
    return {"a": {"layers": [list(range(1000)) for _ in range(1000)]}}


TOO_LARGE = {
    "text": ("a:" + "0" * MAX_CHARACTERS, "longer than 16000 characters"),
    "parts": ("a:0," * MAX_PARTS + "a:0", "65 parts; at most 64"),
    "60,000 parts": ("a," * 60_000, "longer than 16000"),
    "json": ('{"a": "' + "0" * MAX_CHARACTERS + '"}', "longer than 16000 characters"),
    "json-keys": (json.dumps(dict.fromkeys(map(str, range(65)), 1)), "65 parts; at most 64"),
    "json-depth": ('{"a":' * 6 + "1" + "}" * 6, "nested more than 4 deep"),
    "keys": (dict.fromkeys(map(str, range(65)), 1), "65 parts; at most 64"),
    "million-keys": (dict.fromkeys(range(10**6), 1), "1000000 parts"),
    "options": ({"a": dict.fromkeys(map(str, range(MAX_OPTIONS + 1)), 1)}, "17 options"),
    "depth": ({"a": {"layers": [[[[1]]]]}}, "nested more than 4 deep"),
    "key": ({"a" * (MAX_CHARACTERS + 1): 1}, "longer than 16000"),
    "number": ({"a": 10**80_000}, "longer than 16000"),
    "list": ({"a": {"layers": [0] * 10**6}}, "longer than 16000"),
    "lists": (wide(), "longer than 16000"),
    "endless": (endless(), "nested more than 4 deep"),
    "shared": ({"a": shared(60)}, "nested more than 4 deep"),
    "shared-wide": ({"a": shared(4, 10_000)}, "nested more|longer than"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
@pytest.mark.parametrize("entry", ["resolve", "doses", "admit", "admit_and_set_cache_key"])
def test_a_value_above_the_ceilings_is_refused_at_once(plan: Any, case: str, entry: str) -> None:
    request_value, message = TOO_LARGE[case]
    config = SimpleNamespace(additional_config={"steer": plan.to_json()})
    params = SimpleNamespace(extra_args={"steer": request_value})
    doors = {
        "resolve": lambda: resolve(request_value, plan),
        "doses": lambda: plan.doses(request_value),
        "admit": lambda: admit(params, config),
        "admit_and_set_cache_key": lambda: admit_and_set_cache_key(
            SimpleNamespace(sampling_params=params), config
        ),
    }
    begin = time.process_time()
    with pytest.raises(SteerRequestError, match=message) as caught:
        doors[entry]()
    assert time.process_time() - begin < 0.5
    assert len(str(caught.value)) < 300


def test_the_largest_values_are_served(plan: Any) -> None:
    assert plan.doses(",".join(["a:1"] * 32 + ["b:0.5"] * 32))
    assert plan.doses("a:1" + "0" * 20 + " " * (MAX_CHARACTERS - 30)) == plan.doses("a:1e20")
    assert plan.doses('{"a": 1' + " " * (MAX_CHARACTERS - 9) + "}") == plan.doses("a:1")


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("request_value", "message"),
    [
        (5, "steer is 5; allowed: a string"),
        (10**400, "steer is a whole number of 401 digits; allowed"),
        (True, "steer is True; allowed"),
        (b"a:1", "steer is b'a:1'; allowed"),
        ([["a"]], r"steer is \[\['a'\]\]; allowed"),
        (object(), "steer is an object; allowed"),
        ({"a", "b"}, "steer is .*; allowed"),
        (Text("a:1"), "steer holds 'a:1' of type Text, which does not travel"),
        ({"a": np.float64(1)}, "of type float64, which does not travel to the engine"),
        ({"a": np.float32(1)}, "strength a .*float32.*; expected a number"),
        ({Text("a"): 1}, "of type Text, which does not travel"),
        ({"a": 10**30}, "steer holds a whole number of 31 digits; .* at most 64 bits"),
        ({"a": -(2**63) - 1}, "at most 64 bits"),
        ({"a": 1, "b": object()}, "steer b has strength an object; expected a number"),
        ({"a": {"strength": {1, 2}}}, "steer a has strength .*; expected a number"),
        ("\ud800", r"steer '\\ud800' is unknown"),
        ({"a": "\ud800"}, r"steer a has strength '\\ud800'"),
    ],
    ids=range(17),
)
def test_a_value_that_is_invalid_or_not_serialisable_is_described(
    plan: Any, request_value: Any, message: str
) -> None:
    config = SimpleNamespace(additional_config={"steer": plan.to_json()})
    with pytest.raises(RejectedSteer, match=message):
        admit(SimpleNamespace(extra_args={"steer": request_value}), config)


def test_every_admitted_value_can_be_serialised(plan: Any) -> None:
    import msgspec

    for request_value in ({"a": 2**64 - 1}, {"a": -(2**63)}, {"a": 1.5}, {"a": "1"}, '{"a": 1}'):
        assert plan.doses(request_value)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(request_value)) == request_value


@pytest.mark.parametrize(
    "text",
    ["1_0", "\u0661\u0662", "\uff11", "0x1", "nan", "NaN", "inf", "infinity", "-Infinity", "1.",
     ".", "+", "1e", "e5", "1e+", "--1", "+-1", "1 0", "1\u00a0", "\u20091", "\u00b2", "1d", "1f",
     "1,5", "\u0967", "0b1", "0o7", "1e5.0", "\u22121"],
)  # fmt: skip
def test_only_ascii_numbers_are_numbers(plan: Any, text: str) -> None:
    for request_value in ({"a": text}, f"a:{text}", json.dumps({"a": {"strength": text}})):
        with pytest.raises(SteerRequestError) as caught:
            resolve(request_value, plan)
        assert "expected a number, such as a:1.5" in str(caught.value) or "," in text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("+1", 1), ("-1.50", -1.5), (".5", 0.5), ("-.5", -0.5), ("1e3", 1000),
     ("1E+3", 1000), ("25e-1", 2.5), (" 1 ", 1), ("\t1\n", 1)],
)  # fmt: skip
def test_every_ascii_number_is_a_number(plan: Any, text: str, value: float) -> None:
    for request_value in ({"a": text}, f"a:{text}", json.dumps({"a": text})):
        assert resolve(request_value, plan)[0].strength == value


def test_names_are_cut_in_messages_as_values_are(make_plan: Any) -> None:
    plan = make_plan(
        {f"steer-with-a-name-{n}": 1.0 for n in range(200)},
        presets={f"preset-{n}": {} for n in range(500)},
        max_steers=200,
    )
    for request_value in (
        "x" * 15_000,
        {"y" * 15_000: 1},
        {"steer-with-a-name-0": dict.fromkeys(["o" * 1000, "p" * 1000, "q" * 1000], 1)},
        {"z" * 15_000: "dynamic:::"},
        "w" * 15_000 + ":dynamic:::",
    ):
        with pytest.raises(SteerRequestError) as caught:
            resolve(request_value, plan)
        assert len(str(caught.value)) < 800
    with pytest.raises(SteerRequestError, match=r"steer-with-a-name-0, .* and \d+ more; presets: "):
        resolve("x", plan)


@given(
    request_value=st.recursive(
        st.none()
        | st.booleans()
        | st.floats()
        | st.integers()
        | st.text()
        | st.binary()
        | st.just(10**500)
        | st.builds(object),
        lambda inner: (
            st.lists(inner)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from(["a", "b", "strength", "layers"]) | st.text(), inner)
        ),
    )
)
@settings(deadline=500)
def test_any_value_resolves_or_is_refused_in_time(request_value: Any) -> None:
    for value in (
        request_value,
        {"a": request_value},
        {"a": {"strength": request_value}},
        {"a": {"layers": request_value}},
    ):
        try:
            PLAN.doses(value)
        except SteerRequestError as error:
            assert 0 < len(str(error)) <= 1000
