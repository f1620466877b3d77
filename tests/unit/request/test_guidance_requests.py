"""A request's options layers, phase and schedule, and the resulting doses."""

import json
import math
from typing import Any

import pytest
from guidance import delta, head, plan_for, vector
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer import SteerError, SteerRequestError
from vllm_steer.doses import PHASES, Dose
from vllm_steer.plan import SteerPlan
from vllm_steer.request import check_request, read_dose, resolve
from vllm_steer.steers.schedules import SCHEDULES

STEERS: dict[str, Any] = {
    "push": vector((4, 5, 6, 9), default_strength=8.0),
    "spin": vector((5,), mode="rotate", site="attn_in"),
    "walk": delta(3, (4, 6), schedule="dim", default_strength=-2.0),
    "word": head(default_strength=3.0),
}
PRESETS = {
    "late": {"push": {"strength": 2, "layers": "4-5", "phase": "generation"}, "word": 1.0},
    "plain": {"push": 2.0},
    "default": {"walk": {"schedule": "start"}},
}
PLAN = plan_for(STEERS, presets=PRESETS, max_steers_per_request=4)
DIM: Any = {"schedule": "dim"}


@pytest.mark.parametrize(
    ("request_value", "doses"),
    [
        ("push", [Dose("push", 8.0)]),
        ("walk", [Dose("walk", -2.0, **DIM)]),
        ({"push": {}}, [Dose("push", 8.0)]),
        ({"push": {"layers": "4-6"}}, [Dose("push", 8.0, (4, 5, 6))]),
        ({"push": {"layers": [9, 4]}}, [Dose("push", 8.0, (4, 9))]),
        ({"push": {"layers": (9, "4")}}, [Dose("push", 8.0, (4, 9))]),
        ({"push": {"layers": 5}}, [Dose("push", 8.0, (5,))]),
        ({"push": {"layers": "4-6,9"}}, [Dose("push", 8.0)]),
        ({"push": {"layers": [4, 5, 6, 9]}}, [Dose("push", 8.0)]),
        ({"push": {"layers": None}}, [Dose("push", 8.0)]),
        ({"push": {"phase": None}}, [Dose("push", 8.0)]),
        ({"spin": {"layers": "5"}}, [Dose("spin", 1.0)]),
        ({"push": {"phase": "all"}}, [Dose("push", 8.0)]),
        ({"push": {"phase": "prompt", "strength": "-1"}}, [Dose("push", -1.0, phase="prompt")]),
        ({"walk": {"schedule": "fixed"}}, [Dose("walk", -2.0, schedule="fixed")]),
        ({"walk": {"schedule": None}}, [Dose("walk", -2.0, **DIM)]),
        ({"walk": {"phase": "generation"}}, [Dose("walk", -2.0, phase="generation", **DIM)]),
        ({"walk": {"layers": "6", **DIM}}, [Dose("walk", -2.0, (6,), **DIM)]),
        (
            {"walk": {"schedule": "start", "phase": "prompt"}},
            [Dose("walk", -2.0, phase="prompt", schedule="start")],
        ),
        ({"word": {"phase": "all"}}, [Dose("word", 3.0)]),
        ({"push": {"strength": 0, "layers": "4"}}, []),
        ({"push": 1, "walk": {"strength": 0.0}}, [Dose("push", 1.0)]),
    ],
    ids=str,
)
def test_options_resolve_to_doses(request_value: Any, doses: list[Dose]) -> None:
    assert resolve(request_value, PLAN) == tuple(doses)
    if json.loads(json.dumps(request_value)) == request_value and isinstance(request_value, dict):
        assert resolve(json.dumps(request_value), PLAN) == tuple(doses)


@pytest.mark.parametrize(
    ("request_value", "doses"),
    [
        ("push:1,push:2", [Dose("push", 3.0)]),
        ("plain,push:1", [Dose("push", 3.0)]),
        ({"plain": 1, "push": {"strength": 1, "layers": "4-6,9", "phase": "all"}},
         [Dose("push", 3.0)]),
        ({"plain": 1, "push": {"strength": 1, "layers": "4-6"}},
         [Dose("push", 2.0), Dose("push", 1.0, (4, 5, 6))]),
        ({"plain": 1, "push": {"strength": 1, "phase": "prompt"}},
         [Dose("push", 2.0), Dose("push", 1.0, phase="prompt")]),
        ({"late": 1, "push": {"strength": 1, "layers": [5, 4], "phase": "generation"}},
         [Dose("push", 3.0, (4, 5), "generation"), Dose("word", 1.0)]),
        ({"default": 1, "walk": {"strength": 1, "schedule": "start"}},
         [Dose("walk", -1.0, schedule="start")]),
        ({"default": 1, "walk": 1},
         [Dose("walk", -2.0, schedule="start"), Dose("walk", 1.0, **DIM)]),
        ({"plain": 1, "push": -2}, []),
        ("plain:-1,push:2,spin", [Dose("spin", 1.0)]),
    ],
    ids=str,
)  # fmt: skip
def test_equal_doses_are_summed_and_different_ones_stay_separate(
    request_value: Any, doses: list[Dose]
) -> None:
    assert resolve(request_value, PLAN) == tuple(doses)


@pytest.mark.parametrize(
    ("request_value", "doses"),
    [
        ("late", [Dose("push", 2.0, (4, 5), "generation"), Dose("word", 1.0)]),
        ("late:-0.5", [Dose("push", -1.0, (4, 5), "generation"), Dose("word", -0.5)]),
        ({"late": {"strength": 3}}, [Dose("push", 6.0, (4, 5), "generation"), Dose("word", 3.0)]),
        ({"late": {}}, [Dose("push", 2.0, (4, 5), "generation"), Dose("word", 1.0)]),
        ("late:0", []),
        ("default", [Dose("walk", -2.0, schedule="start")]),
        ("default:2", [Dose("walk", -4.0, schedule="start")]),
    ],
    ids=str,
)
def test_a_preset_multiplies_its_mix_and_keeps_its_options(
    request_value: Any, doses: list[Dose]
) -> None:
    assert resolve(request_value, PLAN) == tuple(doses)


def test_a_default_with_options_applies_to_requests_without_a_steer() -> None:
    plan = plan_for(STEERS, presets=PRESETS, default='{"push": {"layers": "9", "strength": 1}}')
    assert plan.doses(None) == (Dose("push", 1.0, (9,)),)
    assert plan.doses("none") == plan.doses({}) == ()
    assert plan_for(STEERS, presets=PRESETS, default="late").doses(None) == resolve("late", PLAN)


WANTED = "expected 0-based layers such as '8-31'"


@pytest.mark.parametrize(
    ("request_value", "message"),
    [
        ({"push": {"layers": "3-4"}}, r"^steer push: layers 3 are not in this steer; it has 4-6,9"),
        ({"push": {"layers": "0-9"}}, "steer push: layers 0-3,7-8 are not in this steer"),
        ({"push": {"layers": "4,4"}}, f"steer push: layers is '4,4'; {WANTED}"),
        ({"push": {"layers": []}}, f"steer push: layers is .*; {WANTED}"),
        ({"push": {"layers": ""}}, f"steer push: layers is ''; {WANTED}"),
        ({"push": {"layers": {"4": 1}}}, f"steer push: layers is .*; {WANTED}"),
        ({"push": {"layers": True}}, f"steer push: layers is True; {WANTED}"),
        ({"push": {"layers": 4.0}}, f"steer push: layers is 4.0; {WANTED}"),
        ({"push": {"layers": 10**5000}}, f"steer push: layers is .*; {WANTED}"),
        ({"push": {"layers": [10**5000]}}, f"steer push: layers is .*; {WANTED}"),
        ({"push": {"phase": "decode"}}, "push has phase 'decode'; allowed: all, prompt, gene"),
        ({"push": {"phase": ["all"]}}, r"steer push has phase \['all'\]; allowed: all"),
        ({"push": {"phase": 10**5000}}, "steer push has phase a whole number of about 5001 d"),
        ({"walk": {"schedule": "none"}}, "walk has schedule 'none'; allowed: fixed, start, dim"),
        ({"walk": {"schedule": 0}}, "steer walk has schedule 0; allowed: fixed"),
        ({"push": {"schedule": "fixed"}}, "push is of kind vector: only a delta steer has"),
        ({"spin": {"schedule": ""}}, "spin is of kind vector: only a delta"),
        ({"word": {"schedule": "fixed"}}, "steer word acts at the LM head: it has no layers"),
        ({"word": {"schedule": None}}, "steer word acts at the LM head: it has no layers"),
        ({"word": {"layers": "4"}}, "steer word acts at the LM head: it has no layers"),
        ({"word": {"phase": "generation"}}, "no phase but 'all'; give it a strength only"),
        ({"push": {"layer": 4}}, "push has unknown options layer; allowed: strength, lay"),
        ({"push": {"b": 1, "a": 1}}, "steer push has unknown options a, b; allowed"),
        ({"push": {4: 1}}, "steer push has unknown options 4; allowed"),
        ({"push": {10**5000: 1}}, "steer push has unknown options .*; allowed"),
        ({10**5000: 1}, "is unknown; steers: push"),
        ({"push": {"strength": {"x": 1}}}, "steer push has strength {'x': 1}; expected a number"),
        ({"push": {"strength": math.nan}}, "steer push has strength nan; it must be finite"),
        ({"push": [8]}, r"steer push has strength \[8\]; expected a number"),
        ({"push": None}, "steer push has strength None; expected a number"),
        ("push:8:layers", "steer push has strength '8:layers'; expected a number"),
        ({"late": {"layers": "4"}}, "late is a preset: it takes a strength only, a factor"),
        ({"late": {"strength": 1, "phase": "all"}}, "late is a preset: it takes a strength only"),
        ({"late": {"strength": None}}, "steer late has strength None; expected a number"),
        ({"late": None}, "steer late has strength None; expected a number"),
        ({"walk": {"schedule": "start", "phase": "generation"}}, "together they do nothing; drop"),
        ('{"push": {"layers": "4"}', "is not JSON"),
        ('{"push": {"layers": 4}}}', "is not JSON"),
        ('[{"push": 1}]', "steer is .*; allowed: a string such as"),
    ],
    ids=lambda value: "huge" if _is_huge(value) else str(value)[:60],
)  # fmt: skip
def test_the_error_of_a_wrong_option_names_it_and_the_allowed_values(
    request_value: Any, message: str
) -> None:
    with pytest.raises(SteerRequestError, match=message) as caught:
        resolve(request_value, PLAN)
    assert len(str(caught.value)) < 400


def _is_huge(value: Any) -> bool:
    try:
        str(value)
    except ValueError:
        return True
    return False


def test_a_short_text_of_many_layers_is_refused_at_once() -> None:
    with pytest.raises(SteerRequestError, match=WANTED):
        resolve({"push": {"layers": "0-9999," * 2_000 + "0"}}, PLAN)


def test_different_doses_of_one_steer_each_count_for_the_limit() -> None:
    both = {"plain": 1, "push": {"strength": 1, "layers": "4"}}
    assert len(resolve(both, PLAN)) == 2
    one = plan_for(STEERS, presets=PRESETS, max_steers_per_request=1)
    assert len(resolve({"plain": 1, "push": 1}, one)) == 1
    with pytest.raises(SteerRequestError, match="2 steers are asked for; at most 1 are allowed"):
        resolve(both, one)


@pytest.mark.parametrize("strength", [10, -10, 10.0])
def test_the_largest_strength_is_that_of_a_dose(strength: float) -> None:
    plan = plan_for(
        STEERS, presets={"p": {"push": {"strength": 5, "layers": "4"}}}, max_strength=10
    )
    assert resolve({"push": {"strength": strength, "layers": "4"}}, plan)[0].strength == strength
    for request_value in (
        {"push": {"strength": 1.5 * strength, "layers": "4"}},
        f"p:{strength * 0.3}",
    ):
        with pytest.raises(SteerRequestError, match=r"strength -?15; allowed: -10 to 10"):
            resolve(request_value, plan)


def test_a_preset_that_cannot_be_served_stops_the_start() -> None:
    for request_value, message in [
        ({"push": {"layers": "0"}}, "preset p: steer push: layers 0 are not in this steer"),
        ({"word": {"layers": "4"}}, "preset p: steer word acts at the LM head"),
        ({"walk": {"phase": "late"}}, "preset p: steer walk has phase 'late'"),
        ({"push": 11.0}, "preset p: steer push has strength 11; allowed: -10 to 10"),
    ]:
        plan = plan_for(STEERS, presets={"p": request_value}, max_strength=10)
        with pytest.raises(SteerError, match=message) as caught:
            check_request("p", plan, source="preset p")
        assert not isinstance(caught.value, SteerRequestError)


def test_a_steer_object_resolves_like_a_steer_of_a_plan() -> None:
    assert read_dose("x", {"layers": "9", "phase": "prompt"}, STEERS["push"]) == Dose(
        "x", 8.0, (9,), "prompt"
    )
    assert read_dose("x", None, STEERS["spin"]) == Dose("x", 1.0)
    assert read_dose("x", 2, STEERS["walk"]) == Dose("x", 2.0, **DIM)


scalars: Any = (
    st.none() | st.booleans() | st.floats() | st.integers() | st.text()
    | st.sampled_from(["4", "4-6", "4-9", "start", "fixed", "dim", "prompt", "generation", "all"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
options = st.dictionaries(
    st.sampled_from(["strength", "layers", "phase", "schedule"]) | st.text(max_size=3), values
)
requests = st.dictionaries(st.sampled_from([*STEERS, *PRESETS]) | st.text(), options | values)


@given(request_value=requests, as_text=st.booleans())
def test_no_value_raises_anything_but_a_request_error(request_value: Any, as_text: bool) -> None:
    try:
        doses = resolve(json.dumps(request_value) if as_text else request_value, PLAN)
    except SteerRequestError as error:
        assert str(error)
    else:
        assert_served(doses, PLAN)


def assert_served(doses: tuple[Dose, ...], plan: SteerPlan) -> None:
    """What workers rely on: nothing of it is checked again."""
    assert len(doses) <= plan.limits.max_steers_per_request
    assert len({(d.steer, d.layers, d.phase, d.schedule) for d in doses}) == len(doses)
    for dose in doses:
        steer = plan.steers[dose.steer]
        assert dose.strength != 0 and abs(dose.strength) <= 3.4028235e38
        assert dose.phase in PHASES
        assert (dose.schedule in SCHEDULES) == (steer.kind == "delta")
        if dose.layers is not None:
            assert steer.layers is not None and set(dose.layers) < set(steer.layers)
            assert dose.layers == tuple(sorted(dose.layers))


good = st.fixed_dictionaries(
    {"strength": st.floats(-100, 100).filter(bool)},
    optional={
        "phase": st.sampled_from(["all", "prompt"]),
        "layers": st.sets(st.sampled_from([4, 6]), min_size=1).map(sorted),
    },
)


@given(request_value=st.dictionaries(st.sampled_from(["push", "walk"]), good))
def test_every_notation_of_the_same_options_resolves_to_the_same_doses(request_value: Any) -> None:
    expected = resolve(request_value, PLAN)
    assert {d.steer for d in expected} == set(request_value)
    spelled = {
        name: {k: ",".join(map(str, v)) if k == "layers" else v for k, v in options.items()}
        for name, options in request_value.items()
    }
    backwards = dict(reversed(request_value.items()))
    for other in (json.dumps(request_value), f" {json.dumps(request_value)} ", spelled, backwards):
        assert set(resolve(other, PLAN)) == set(expected)
