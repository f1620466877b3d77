"""Dynamic strength in a request: the doses of each notation, and each error."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from guidance import delta, head, plan_for, vector
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_steer import SteerError, SteerRequestError, save_steer
from vllm_steer.config import SteerConfig
from vllm_steer.doses import PHASES, Dose, Dynamic, token_spans
from vllm_steer.plan import SteerPlan
from vllm_steer.request import check_request, read_dose, resolve

STEERS: dict[str, Any] = {
    "fr": delta(3, (4, 6), schedule="dim", default_strength=-8.0),
    "one": delta(1, (4,)),
    "push": vector((4, 5, 6), default_strength=9.0),
    "word": head(default_strength=3.0),
}
PRESETS: dict[str, Any] = {
    "french": {"fr": "dynamic:1.5:0.6", "word": 2.0},
    "loud": {"push": {"strength": "dynamic", "max": -3, "kl": "authors", "layers": "5"}},
    "fixed": {"fr": 1.0},
}
PLAN = plan_for(STEERS, presets=PRESETS)
D = "dynamic"


def inside(name: str, maximum: float = 2.0, *arguments: Any, **fields: Any) -> Dose:
    """A dynamic dose in the layers: from the last prompt token on, without a schedule."""
    return Dose(name, maximum, phase="answer", dynamic=Dynamic(*arguments), **fields)


def at_head(maximum: float = 2.0, *arguments: Any) -> Dose:
    return Dose("word", maximum, dynamic=Dynamic(*arguments))


@pytest.mark.parametrize(
    ("request_value", "doses"),
    [
        ("fr:dynamic", [inside("fr")]),
        ("fr:dynamic:1.5", [inside("fr", 1.5)]),
        ("fr:dynamic:-1.5:0.6", [inside("fr", -1.5, 0.6)]),
        (" fr : dynamic : 1e-1 : 1 ", [inside("fr", 0.1, 1.0)]),
        ("fr:dynamic,push:2", [inside("fr"), Dose("push", 2.0)]),
        ("fr:dynamic:1,push:dynamic:3:.9", [inside("fr", 1.0), inside("push", 3.0, 0.9)]),
        ("one:dynamic", [inside("one")]),
        ("word:dynamic:4", [at_head(4.0)]),
        ({"fr": D}, [inside("fr")]),
        ({"fr": "dynamic:1.5:0.6"}, [inside("fr", 1.5, 0.6)]),
        ({"fr": {"strength": D}}, [inside("fr")]),
        ({"fr": {"strength": D, "max": 2, "top_p": 0.5, "kl": "plain"}}, [inside("fr")]),
        ({"fr": {"strength": D, "max": -3, "kl": "authors"}}, [inside("fr", -3.0, 0.5, "authors")]),
        ({"fr": {"strength": D, "max": "1.5", "top_p": " 0.25 "}}, [inside("fr", 1.5, 0.25)]),
        ({"fr": {"strength": D, "top_p": 1}}, [inside("fr", 2.0, 1.0)]),
        ({"fr": {"strength": D, "layers": "6"}}, [inside("fr", layers=(6,))]),
        ({"fr": {"strength": D, "layers": [6, 4]}}, [inside("fr")]),
        ({"fr": {"strength": D, "max": None, "top_p": None, "kl": None, "phase": None,
                 "schedule": None, "layers": None}}, [inside("fr")]),
        ({"fr": {"schedule": D}}, [inside("fr")]),
        ({"fr": {"schedule": D, "max": 1, "top_p": 0.9, "layers": "4"}},
         [inside("fr", 1.0, 0.9, layers=(4,))]),
        ({"push": {"strength": D, "layers": "4-5"}}, [inside("push", layers=(4, 5))]),
        ({"word": {"strength": D, "max": 1e-3, "kl": "authors"}}, [at_head(1e-3, 0.5, "authors")]),
        ({"fr": {"strength": D}, "word": {"strength": D, "max": 1}}, [inside("fr"), at_head(1.0)]),
        ("french", [inside("fr", 1.5, 0.6), Dose("word", 2.0)]),
        ("french:1", [inside("fr", 1.5, 0.6), Dose("word", 2.0)]),
        ("french:-2", [inside("fr", -3.0, 0.6), Dose("word", -4.0)]),
        ("french:0", []),
        ({"french": {"strength": 0.5}}, [inside("fr", 0.75, 0.6), Dose("word", 1.0)]),
        ("loud", [inside("push", -3.0, 0.5, "authors", layers=(5,))]),
        ("french,word:1", [inside("fr", 1.5, 0.6), Dose("word", 3.0)]),
        ("loud:2,fixed", [inside("push", -6.0, 0.5, "authors", layers=(5,)),
                          Dose("fr", 1.0, schedule="dim")]),
    ],
    ids=str,
)  # fmt: skip
def test_every_request_form_resolves_to_a_dose_with_its_maximum(
    request_value: Any, doses: list[Dose]
) -> None:
    assert resolve(request_value, PLAN) == tuple(doses)
    if isinstance(request_value, dict):
        assert resolve(json.dumps(request_value), PLAN) == tuple(doses)


@pytest.mark.parametrize("default", ["fr:dynamic:1.5:0.6,word:2", "french"])
def test_a_dynamic_default_applies_to_requests_without_a_steer(default: str) -> None:
    plan = plan_for(STEERS, presets=PRESETS, default=default)
    assert plan.doses(None) == (inside("fr", 1.5, 0.6), Dose("word", 2.0))
    assert plan.doses("none") == ()


def test_a_steer_object_resolves_like_a_steer_of_a_plan() -> None:
    assert read_dose("x", "dynamic:1", STEERS["fr"]) == inside("x", 1.0)
    assert read_dose("x", {"schedule": D}, STEERS["fr"]) == inside("x")


def test_a_steer_may_be_called_dynamic() -> None:
    plan = plan_for({D: STEERS["fr"]})
    assert resolve("dynamic:dynamic:1", plan) == (inside(D, 1.0),)
    assert resolve("dynamic:1", plan) == (Dose(D, 1.0, schedule="dim"),)


def fr(**options: Any) -> dict[str, Any]:
    return {"fr": {"strength": D, **options}}


@pytest.mark.parametrize(
    ("request_value", "message"),
    [
        (fr(max=True), "^steer fr has max True; expected a number, such as 2, or -2 for the opp"),
        (fr(max="much"), "steer fr has max 'much'; expected a number"),
        (fr(max=[2]), r"steer fr has max \[2\]; expected a number"),
        (fr(max=math.nan), "steer fr has max nan; it must be finite"),
        (fr(max=-math.inf), "steer fr has max -inf; it must be finite"),
        (fr(max=10**5000), "steer fr has max a whole number of about 5001 digits; expected a num"),
        (fr(max=1e39), r"steer fr adds up to max 1e\+39; it must be finite"),
        (fr(max=0), "steer fr has max 0: its strengths would all be 0; give another, or leave"),
        (fr(max="-0.0"), "steer fr has max '-0.0': its strengths would all be 0"),
        ("fr:dynamic:0", "steer fr has max '0': its strengths would all be 0"),
        ("fr:dynamic:big", "steer fr has max 'big'; expected a number"),
        (fr(top_p=0), "steer fr has top_p 0; it must be above 0 and at most 1"),
        (fr(top_p=-0.5), "steer fr has top_p -0.5; it must be above 0 and at most 1"),
        (fr(top_p=1.0001), "steer fr has top_p 1.0001; it must be above 0 and at most 1"),
        (fr(top_p=math.nan), "steer fr has top_p nan; it must be finite"),
        (fr(top_p=True), "steer fr has top_p True; expected a number, above 0 and at most 1"),
        (fr(top_p="half"), "steer fr has top_p 'half'; expected a number"),
        ("fr:dynamic:1:50", "steer fr has top_p '50'; it must be above 0 and at most 1"),
        (fr(kl="reverse"), "steer fr has kl 'reverse'; allowed: plain, authors"),
        (fr(kl=["plain"]), r"steer fr has kl \['plain'\]; allowed: plain, authors"),
        (fr(maximum=2), "steer fr has unknown options maximum; allowed: .*, max, top_p, kl"),
        (fr(layers="5"), "steer fr: layers 5 are not in this steer; it has 4,6"),
        ("fr:dynamic:", "steer fr has strength 'dynamic:'; after 'dynamic' a maximum may follow"),
        ("fr:dynamic::0.5", "such as fr:dynamic:1.5:0.6"),
        ("fr:dynamic:1:0.5:plain", "steer fr has strength 'dynamic:1:0.5:plain'; after 'dynamic'"),
        ("fr:Dynamic", "steer fr has strength 'Dynamic'; expected a number, .* or 'dynamic'"),
        ("fr:dynamics", "steer fr has strength 'dynamics'; expected a number"),
        ({"fr": {"strength": "dynamic:1"}}, "steer fr has strength 'dynamic:1'; expected a numb"),
        ({"fr": {"max": 2}}, "fr has max, which only a dynamic strength has; .*'dynamic', or drop "
                             "it$"),
        ({"fr": {"strength": 1, "kl": "plain", "top_p": 0.5}},
         "fr has top_p, kl, which only a dynamic strength has; .* or drop them$"),
        ({"word": {"max": 2}}, "word has max, which only a dynamic strength has"),
        (fr(schedule="fixed"), "fr has schedule 'fixed' and strength 'dynamic', .*; drop one"),
        (fr(schedule=D), "fr has schedule 'dynamic' and a strength: the schedule stands for"),
        ({"fr": {"strength": 1.5, "schedule": D}}, "drop it, and give the largest strength as max"),
        (fr(phase="all"), "fr has phase 'all' and a dynamic strength, .*last prompt token.*drop"),
        (fr(phase="generation"), "fr has phase 'generation' and a dynamic strength"),
        (fr(phase="answer"), "fr has phase 'answer' and a dynamic strength"),
        ({"fr": {"schedule": D, "phase": "prompt"}}, "fr has phase 'prompt' and a dynamic"),
        ({"fr": {"strength": 1, "phase": "answers"}}, "phase 'answers'; allowed: all, prompt, ge"),
        ({"push": {"schedule": D}}, "push is of kind vector: only a delta.* ask for strength 'dyn"),
        ({"word": {"schedule": D}}, "steer word acts at the LM head: it has no layers, no schedul"),
        ({"word": {"strength": D, "layers": "4"}}, "steer word acts at the LM head"),
        ({"word": {"strength": D, "phase": "all"}}, "word has phase 'all' and a dynamic strength"),
        ("fr:dynamic,fr:dynamic", "fr is asked for more than once, .*; ask for it once"),
        ("fr:dynamic,fr:1", "fr is asked for more than once"),
        ("fr:1,fr:dynamic:1", "fr is asked for more than once"),
        ("french,fr:dynamic", "fr is asked for more than once"),
        ("french,fixed", "fr is asked for more than once"),
        ("french,french", "fr is asked for more than once"),
        ({"loud": 1, "push": {"strength": 1, "layers": "6"}}, "push is asked for more than once"),
        ("french:dynamic", "^french is a preset: its strength is a factor of its mix, a number"),
        ({"fixed": {"strength": D, "max": 1}}, "fixed is a preset: its strength is a factor"),
        ({"french": {"max": 1}}, "french is a preset: it takes a strength only"),
        ("french:1e308,word", "steer fr adds up to max"),
    ],
    ids=lambda value: _short(value),
)  # fmt: skip
def test_the_error_of_a_wrong_value_names_it_and_the_allowed_values(
    request_value: Any, message: str
) -> None:
    with pytest.raises(SteerRequestError, match=message) as caught:
        resolve(request_value, PLAN)
    assert len(str(caught.value)) < 400


def _short(value: Any) -> str:
    try:
        return str(value)[:60]
    except ValueError:
        return "huge"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_limit_of_strengths_bounds_the_maximum(sign: int) -> None:
    plan = plan_for(STEERS, presets={"p": {"fr": "dynamic:4"}}, max_strength=10)
    assert resolve(f"fr:dynamic:{sign * 10}", plan) == (inside("fr", sign * 10.0),)
    for request_value in (f"fr:dynamic:{sign * 12}", f"p:{sign * 3}", f"word:dynamic:{sign * 12}"):
        with pytest.raises(SteerRequestError, match=rf"max {sign * 12}; allowed: -10 to 10"):
            resolve(request_value, plan)
    with pytest.raises(SteerRequestError, match="fr has max 2; allowed: -1 to 1"):
        resolve("fr:dynamic", plan_for(STEERS, max_strength=1))


def test_dynamic_doses_count_for_the_number_of_steers() -> None:
    plan = plan_for(STEERS, max_steers_per_request=1)
    assert len(resolve("fr:dynamic", plan)) == 1
    with pytest.raises(SteerRequestError, match="2 steers are asked for; at most 1 are allowed"):
        resolve("fr:dynamic,push:1", plan)


def test_a_config_may_have_dynamic_parts_and_says_where_they_are_wrong(tmp_path: Path) -> None:
    save_steer(head(), tmp_path / "w.safetensors")

    def plan(preset: Any, default: str = "none") -> SteerPlan:
        steers = {"w": {"path": str(tmp_path / "w.safetensors")}}
        config = {"steers": steers, "presets": {"p": preset}, "default": default}
        return SteerPlan.of(SteerConfig.load(config))

    for preset in ({"w": "dynamic:1.5:0.6"}, {"w": {"strength": D, "max": 1.5, "top_p": 0.6}}):
        result = plan(preset, "p")
        expected = (Dose("w", 1.5, dynamic=Dynamic(0.6)),)
        assert result.doses(None) == SteerPlan.from_json(result.to_json()).doses(None) == expected
    for wrong_preset, message in [
        ({"w": "dynamic:0"}, "preset p: steer w has max '0'"),
        ({"w": "dynamically"}, "preset p: steer w has strength 'dynamically'"),
        ({"w": {"max": 1}}, "preset p: steer w has max, which only a dynamic strength has"),
        ({"w": "much"}, "a finite number, 'dynamic', or options"),
    ]:
        with pytest.raises(SteerError, match=message) as caught:
            plan(wrong_preset)
        assert not isinstance(caught.value, SteerRequestError)
    with pytest.raises(SteerError, match="default: steer w has top_p '2'"):
        plan({}, "w:dynamic:1:2")
    with pytest.raises(SteerError, match="x: steer w has max '0'"):
        check_request("w:dynamic:0", plan({}), source="x")


PAGE = (Path(__file__).parents[3] / "docs" / "dynamic.md").read_text(encoding="utf-8")


def examples_of(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_request_and_preset_of_the_page_resolves() -> None:
    steers = {
        "french": delta(3, tuple(range(16))),
        "formal": vector(tuple(range(16))),
        "detox": head(),
    }
    config = yaml.safe_load("\n".join(examples_of("yaml")))
    plan = plan_for(steers, presets=config["presets"], default=config["default"])
    (formal,) = (dose for dose in plan.doses(None) if dose.steer == "formal")
    assert formal == inside("formal", 3.0, 0.4)
    bodies = [json.loads(body) for body in examples_of("json")]
    request_value = [body["steer"] for body in bodies] + re.findall(r'"steer": "([^".]*)"', PAGE)
    request_value += re.findall(r"`((?:french|parisian):.*?)`", PAGE)
    assert len(request_value) >= 8
    for one in request_value:
        assert any(dose.dynamic for dose in resolve(one, plan)), one


@pytest.mark.parametrize(
    ("steps", "prompt_len", "span"),
    [(None, 7, (6, sys.maxsize)), (None, 1, (0, sys.maxsize)), (3, 7, (6, 9)), (1, 7, (6, 7))],
)
@pytest.mark.parametrize("dynamic", [Dynamic(), None], ids=["dynamic", "its-probe"])
def test_a_dose_and_its_probe_begin_at_the_last_prompt_token(
    dynamic: Dynamic | None, steps: int | None, prompt_len: int, span: tuple[int, int]
) -> None:
    assert token_spans(Dose("x", 1.0, phase="answer", dynamic=dynamic), steps, prompt_len) == (
        span,
    )


scalars: Any = (
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3)
    | st.sampled_from([D, "dynamic:1", "dynamic:1:0.5", "plain", "authors", "4", "start", "0.5"])
)  # fmt: skip
options = st.dictionaries(
    st.sampled_from(["strength", "max", "top_p", "kl", "layers", "phase", "schedule"]), scalars
)
requests = st.dictionaries(
    st.sampled_from([*STEERS, *PRESETS]),
    scalars | options | options.map(lambda more: {**more, "strength": D}),
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(request_value=requests, as_text=st.booleans())
def test_no_value_raises_anything_but_a_request_error(request_value: Any, as_text: bool) -> None:
    try:
        doses = resolve(json.dumps(request_value) if as_text else request_value, PLAN)
    except SteerRequestError as error:
        assert str(error)
        return
    for dose in doses:
        assert dose.strength != 0 and math.isfinite(dose.strength)
        if dose.dynamic:
            assert 0 < dose.dynamic.top_p <= 1 and dose.dynamic.kl in ("plain", "authors")
            assert dose.phase == ("all" if dose.steer == "word" else "answer")
            assert dose.schedule is None
            assert [other.steer for other in doses].count(dose.steer) == 1
        else:
            assert dose.phase in PHASES
            assert (dose.schedule is None) == (dose.steer in ("word", "push"))


@given(
    maximum=st.floats(-1e6, 1e6).filter(bool),
    top_p=st.floats(0, 1, exclude_min=True),
    name=st.sampled_from(sorted(STEERS)),
)
def test_every_notation_of_the_same_doses_resolves_to_them(
    maximum: float, top_p: float, name: str
) -> None:
    spelled = f"{name}:dynamic:{maximum!r}:{top_p!r}"
    nested = {name: {"strength": D, "max": maximum, "top_p": top_p}}
    (dose,) = resolve(nested, PLAN)
    assert (dose.steer, dose.strength, dose.dynamic) == (name, maximum, Dynamic(top_p))
    for request_value in (spelled, {name: spelled.partition(":")[2]}, json.dumps(nested)):
        assert resolve(request_value, PLAN) == (dose,)
