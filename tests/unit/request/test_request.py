"""The doses of a request's ``steer`` value, and the errors of wrong values."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer import SteerError, SteerRequestError, request
from vllm_steer.doses import Dose

STEERS = {"detox": 1.0, "humor": 8.0, "cheer-2.b": -0.5}
PRESETS = {"friendly": {"detox": 5.0, "humor": 1.0}, "calm": {"humor": -2.0}, "empty": {}}


@pytest.fixture
def plan(make_plan: Any) -> Any:
    return make_plan(STEERS, presets=PRESETS)


def resolve(request_value: Any, plan: Any) -> dict[str, float]:
    """Names and strengths of the doses, with at most one dose per steer."""
    return by_name(request.resolve(request_value, plan))


def by_name(doses: tuple[Dose, ...]) -> dict[str, float]:
    assert len({dose.steer for dose in doses}) == len(doses)
    return {dose.steer: dose.strength for dose in doses}


@pytest.mark.parametrize(
    ("request_value", "doses"),
    [
        ("detox:5", {"detox": 5}),
        ("detox:5,humor", {"detox": 5, "humor": 8}),
        (" detox : -5 , humor : 1e-3 ", {"detox": -5, "humor": 0.001}),
        ("cheer-2.b", {"cheer-2.b": -0.5}),
        ("friendly", {"detox": 5, "humor": 1}),
        ("friendly:0.5", {"detox": 2.5, "humor": 0.5}),
        ("friendly,detox:-5", {"humor": 1}),
        ("friendly,calm", {"detox": 5, "humor": -1}),
        ("detox:1,detox:2", {"detox": 3}),
        ("detox:0", {}),
        ("detox:-0.0", {}),
        ("empty", {}),
        ("none", {}),
        (" none ", {}),
        ("", {}),
        ("  ", {}),
        ({}, {}),
        ("{}", {}),
        ({"detox": 5}, {"detox": 5}),
        ({"detox": "5"}, {"detox": 5}),
        ({"detox": 5, "humor": {"strength": -1.5}}, {"detox": 5, "humor": -1.5}),
        ({"humor": {}}, {"humor": 8}),
        ({"humor": {"phase": "all"}}, {"humor": 8}),
        ({"friendly": {"strength": 2}}, {"detox": 10, "humor": 2}),
        ('{"detox": 5, "humor": {"strength": 8}}', {"detox": 5, "humor": 8}),
        (' {"detox": 5}', {"detox": 5}),
    ],
    ids=str,
)
def test_a_value_resolves_to_strengths_by_name(
    plan: Any, request_value: Any, doses: dict[str, float]
) -> None:
    assert resolve(request_value, plan) == doses


@given(
    doses=st.dictionaries(
        st.sampled_from(sorted(STEERS)),
        st.floats(-1e6, 1e6).filter(lambda v: v != 0),
    )
)
def test_every_notation_of_the_same_doses_resolves_to_them(doses: dict[str, float]) -> None:
    plan = _plan()
    spelled = ",".join(f"{name}:{strength!r}" for name, strength in doses.items())
    nested = {name: {"strength": strength} for name, strength in doses.items()}
    for request_value in (doses, nested, spelled, json.dumps(doses), json.dumps(nested)):
        assert resolve(request_value, plan) == doses


@given(
    request_value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_no_json_value_raises_anything_but_a_request_error(request_value: Any) -> None:
    try:
        assert all(map(math.isfinite, resolve(request_value, _plan()).values()))
    except SteerRequestError as error:
        assert str(error)


def _plan() -> Any:
    """The fixture's plan for property tests, which take no function-scoped fixtures."""
    from vllm_steer.config import Limits
    from vllm_steer.plan import PlannedSteer, SteerPlan

    one = {
        "path": "/x",
        "overrides": {},
        "kind": "lm_steer",
        "site": "head",
        "hidden_size": 6,
        "content": "",
    }
    return SteerPlan(
        version="0",
        kernels="auto",
        steers={n: PlannedSteer(default_strength=v, **one) for n, v in STEERS.items()},
        presets=PRESETS,
        default="none",
        limits=Limits(),
    )


def test_the_dict_of_the_caller_is_unchanged(plan: Any) -> None:
    request_value = {"detox": {"strength": 5}, "humor": "3"}
    before = json.dumps(request_value)
    resolve(request_value, plan)
    assert json.dumps(request_value) == before


ALLOWED = "a string such as 'detox:5,humor'"


@pytest.mark.parametrize(
    ("request_value", "message"),
    [
        (5, f"steer is 5; allowed: {ALLOWED}"),
        (True, f"steer is True; allowed: {ALLOWED}"),
        (["detox"], r"steer is \['detox'\]; allowed:"),
        (math.nan, "steer is nan; allowed:"),
        ("happy", "'happy' is unknown; steers: cheer-2.b, detox, humor; presets: calm, empty, fr"),
        ("NONE", "'NONE' is unknown; steers:"),
        ("none,detox", "'none' is unknown"),
        ({"none": 1}, "'none' is unknown"),
        ("Detox", "'Detox' is unknown"),
        ("detox:five", "steer detox has strength 'five'; expected a number, such as detox:1.5"),
        ("detox:5:6", "steer detox has strength '5:6'"),
        ("detox:0x10", "steer detox has strength '0x10'"),
        ("detox:nan", "steer detox has strength 'nan'; expected a number"),
        ("detox:-inf", "steer detox has strength '-inf'; expected a number"),
        ("detox:1e999", "steer detox has strength '1e999'; it must be finite"),
        ("detox:", "incomplete part 'detox:'; allowed:"),
        (":5", "incomplete part ':5'"),
        ("detox,,humor", "incomplete part ''"),
        ("detox,", "incomplete part ''"),
        ({"detox": None}, "steer detox has strength None; expected a number"),
        ({"detox": True}, "steer detox has strength True; expected a number"),
        ({"detox": [5]}, r"steer detox has strength \[5\]"),
        ({"detox": math.inf}, "steer detox has strength inf; it must be finite"),
        (
            {"detox": 10**400},
            "steer detox has strength a whole number of 401 digits; expected a number",
        ),
        ({"detox": {"strength": None}}, "steer detox has strength None"),
        ({"detox": {"strenght": 5}}, "steer detox has unknown options strenght; allowed: strength"),
        ({"detox": {"layers": "1-2"}}, "steer detox acts at the LM head: it has no layers"),
        ({"detox": {"phase": "prompt"}}, "steer detox acts at the LM head"),
        ({"": 5}, "'' is unknown"),
        ({5: 5}, "'5' is unknown"),
        ('{"detox": 5, "detox": 6}', "the key 'detox' is given twice"),
        ('{"detox": 5', "is not JSON"),
        ('{"detox": NaN}', "steer detox has strength nan; it must be finite"),
        ('{"detox": Infinity}', "steer detox has strength inf; it must be finite"),
        ("friendly:1e308", "adds up to strength inf; it must be finite"),
    ],
    ids=str,
)
def test_the_error_of_a_wrong_value_names_it_and_the_allowed_values(
    plan: Any, request_value: Any, message: str
) -> None:
    with pytest.raises(SteerRequestError, match=message):
        resolve(request_value, plan)


@pytest.mark.parametrize(
    "request_value",
    [
        "detox:" + "9" * 5000,
        {"detox": 10**5000},
        {"detox": {"strength": -(10**5000)}},
        '{"detox": ' + "9" * 5000 + "}",
        '{"detox":' * 100_000 + "1" + "}" * 100_000,
    ],
    ids=["string", "integer", "nested-integer", "json-integer", "json-depth"],
)
def test_a_huge_value_gets_an_ordinary_error(plan: Any, request_value: Any) -> None:
    with pytest.raises(SteerRequestError, match="steer"):
        resolve(request_value, plan)


@pytest.mark.parametrize("strength", [3.5e38, -1e300, 1e39])
def test_a_strength_that_is_infinite_in_float32_is_refused(plan: Any, strength: float) -> None:
    """Strengths travel to the device as float32: there these are infinite and rows become NaN."""
    with pytest.raises(SteerRequestError, match=r"steer detox .*strength"):
        resolve({"detox": strength}, plan)


def test_the_error_of_an_unknown_name_lists_presets_only_if_they_exist(make_plan: Any) -> None:
    with pytest.raises(SteerRequestError, match=r"'b' is unknown; steers: a$"):
        resolve("b", make_plan({"a": 1.0}))


def test_as_many_steers_as_allowed_are_admitted(make_plan: Any) -> None:
    plan = make_plan(dict.fromkeys("abc", 1.0), max_steers_per_request=2)
    assert resolve("a,b", plan) == {"a": 1, "b": 1}
    assert resolve("a,b,c:0", plan) == {"a": 1, "b": 1}
    with pytest.raises(SteerRequestError, match="3 steers are asked for; at most 2 are allowed"):
        resolve("a,b,c", plan)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_strength_up_to_the_limit_is_admitted(make_plan: Any, sign: int) -> None:
    plan = make_plan({"a": 1.0}, presets={"p": {"a": 8.0}}, max_strength=10)
    assert resolve({"a": sign * 10}, plan) == {"a": sign * 10}
    for request_value in ({"a": sign * 10.5}, f"a:{sign * 6},a:{sign * 4.5}", f"p:{sign * 1.3125}"):
        with pytest.raises(
            SteerRequestError, match=rf"strength {sign * 10.5:g}; allowed: -10 to 10"
        ):
            resolve(request_value, plan)


def test_a_strength_just_above_the_limit_is_refused_with_exact_numbers(make_plan: Any) -> None:
    with pytest.raises(SteerRequestError, match=r"strength 10\.0000001; allowed: -10 to 10"):
        resolve("a:10.0000001", make_plan({"a": 1.0}, max_strength=10))


@pytest.mark.parametrize(
    ("request_value", "doses"),
    [(None, {"a": 2}), ("none", {}), ("", {}), ({}, {}), ("{}", {}), ("b:3", {"b": 3})],
    ids=str,
)
def test_the_default_applies_only_to_requests_without_a_steer(
    make_plan: Any, request_value: Any, doses: dict[str, float]
) -> None:
    assert by_name(make_plan({"a": 1.0, "b": 1.0}, default="a:2").doses(request_value)) == doses


def test_a_preset_can_be_the_default(make_plan: Any) -> None:
    plan = make_plan({"a": 1.0}, presets={"p": {"a": 4.0}}, default="p")
    assert by_name(plan.doses(None)) == {"a": 4}


def test_a_request_error_is_a_steer_error(plan: Any) -> None:
    with pytest.raises(SteerError):
        resolve("happy", plan)
