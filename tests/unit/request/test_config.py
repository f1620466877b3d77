"""``--steer-config`` and the plan made from it: valid configs, and errors that stop the start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vllm_steer import SteerConfig, SteerError, load_steer, save_steer
from vllm_steer.doses import Dose
from vllm_steer.plan import SteerPlan, is_plan
from vllm_steer.steers.content import content_digest


@pytest.fixture
def folder(tmp_path: Path, make_steer: Any) -> Path:
    save_steer(make_steer(columns=2, rank=3, default_strength=2.0), tmp_path / "a.safetensors")
    save_steer(make_steer("add"), tmp_path / "b.safetensors")
    save_steer(make_steer("offset"), tmp_path / "c.safetensors")
    return tmp_path


FULL: dict[str, Any] = {
    "steers": {
        "a": {"path": "a.safetensors"},
        "b": {"path": "b.safetensors", "default_strength": -8, "epsilon": 0.5},
    },
    "presets": {"friendly": {"a": 5, "b": 1.5}},
    "default": "friendly",
    "limits": {
        "max_steers": 3,
        "max_rank": 9,
        "max_steers_per_request": 2,
        "max_strength": 12.5,
    },
}


def assert_full(config: SteerConfig, folder: Path) -> None:
    assert {name: entry.path for name, entry in config.steers.items()} == {
        "a": folder / "a.safetensors",
        "b": folder / "b.safetensors",
    }
    assert config.steers["b"].overrides == {"default_strength": -8.0, "epsilon": 0.5}
    assert config.presets == {"friendly": {"a": 5.0, "b": 1.5}}
    assert config.default == "friendly"
    assert config.limits.model_dump() == FULL["limits"]


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps], ids=["yaml", "json"])
@pytest.mark.parametrize("as_path", [Path, str], ids=["path", "string"])
def test_a_config_file_is_read_relative_to_itself(folder: Path, dump: Any, as_path: Any) -> None:
    (folder / "steers.any").write_text(dump(FULL))
    assert_full(SteerConfig.load(as_path(folder / "steers.any")), folder)


@pytest.mark.parametrize("form", [dict, json.dumps], ids=["dict", "inline-json"])
def test_inline_configs_are_relative_to_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    monkeypatch.chdir(folder)
    assert_full(SteerConfig.load(form(FULL)), folder)


def test_a_loaded_config_is_used_unchanged(folder: Path) -> None:
    (folder / "steers.yaml").write_text(yaml.safe_dump(FULL))
    config = SteerConfig.load(folder / "steers.yaml")
    assert SteerConfig.load(config) is config


def test_limits_and_default_have_the_documented_values(folder: Path) -> None:
    config = SteerConfig.load({"steers": {"a": {"path": str(folder / "a.safetensors")}}})
    assert config.default == "none"
    assert config.limits.model_dump() == {
        "max_steers": 32,
        "max_rank": 1024,
        "max_steers_per_request": 4,
        "max_strength": None,
    }


def load_yaml(folder: Path, text: str) -> SteerConfig:
    (folder / "steers.yaml").write_text(text)
    return SteerConfig.load(folder / "steers.yaml")


A = "steers: {a: {path: a.safetensors}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a mapping; expected at least the key 'steers'"),
        ("- a\n", "is not a mapping"),
        ("steers: [", "is neither YAML nor JSON"),
        ("steers: !!python/object/apply:os.system ['true']\n", "line 1: the tag .*os.system'"),
        ("presets: {}\n", "key 'steers' is missing"),
        ("steers: {}\n", "steers is empty"),
        ("steers: {a: {}}\n", "key 'steers.a.path' is missing"),
        ("steers: {a: a.safetensors}\n", "steers.a is 'a.safetensors'"),
        ("steers: {1: {path: x}}\n", "the key '1' is no text; put it in quotes"),
        ("steers: {a b: {path: x}}\n", "'a b' cannot be a name: letters, digits"),
        ("steers: {none: {path: x}}\n", "'none' cannot be a name"),
        ("steers: {'': {path: x}}\n", "'' cannot be a name"),
        ("steers: {'a:b': {path: x}}\n", "'a:b' cannot be a name"),
        ("steers: {a: {path: x, epsilom: 1}}\n", "unknown key 'steers.a.epsilom'"),
        ("steers: {a: {path: x, epsilon: -1}}\n", "steers.a.epsilon is -1"),
        ("steers: {a: {path: x, kind: magic}}\n", "steers.a.kind is 'magic'.*'lm_steer'"),
        ("steers: {a: {path: x, default_strength: .nan}}\n", "default_strength is nan"),
        ("steers: {a: {path: x, fixed_columns: 1}}\n", "steers.a.fixed_columns is 1"),
        (A + "preset: {}\n", "unknown key 'preset'"),
        (A + "presets: {p: {b: 1}}\n", "preset p names b; steers: a"),
        (A + "presets: {p: {a: x}}\n", "presets.p.a is 'x'"),
        (A + "presets: {p: {a: .inf}}\n", "presets.p.a is inf"),
        (A + "presets: {p: {a: yes}}\n", "presets.p.a is True"),
        ("steers: {a: {path: x, epsilon: yes}}\n", "steers.a.epsilon is True"),
        (A + "presets: {a: {a: 1}}\n", "a names a steer and a preset"),
        (A + "presets: {'p q': {a: 1}}\n", "'p q' cannot be a name"),
        (A + "presets: {none: {a: 1}}\n", "'none' cannot be a name"),
        (A + "default: {a: 1}\n", "default is {'a': 1}"),
        (A + "limits: {max_steers: 0}\n", "limits.max_steers is 0"),
        (A + "limits: {max_rank: many}\n", "limits.max_rank is 'many'"),
        (A + "limits: {max_strength: 0}\n", "limits.max_strength is 0"),
        (A + "limits: {max_strength: .inf}\n", "limits.max_strength is inf"),
        (A + "limits: {max_strenght: 1}\n", "unknown key 'limits.max_strenght'"),
        (
            "steers: {a: {path: x}, b: {path: x}}\nlimits: {max_steers: 1}\n",
            "2 steers are configured; limits.max_steers is 1",
        ),
    ],
    ids=lambda text: text.strip().replace("\n", "+")[:60],
)
def test_a_wrong_config_is_refused_with_file_key_and_value(
    folder: Path, text: str, message: str
) -> None:
    with pytest.raises(SteerError, match=message) as caught:
        load_yaml(folder, text)
    assert str(folder / "steers.yaml") in str(caught.value)


def test_every_wrong_value_is_named_at_once(folder: Path) -> None:
    with pytest.raises(SteerError) as caught:
        load_yaml(folder, "steers: {a: {epsilon: 0}}\nlimits: {max_rank: 0}\ncolour: red\n")
    for field in ("steers.a.path", "steers.a.epsilon", "limits.max_rank", "colour"):
        assert field in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.yaml", r"steer config gone.yaml: no such file"),
        ("", "is a folder"),
        (".", "steer config .: is a folder"),
        ("{", "inline steer config is not JSON"),
        ('{"steers": {"a": {"path": "x"', "inline steer config is not JSON"),
        (None, "steer config is None; expected a path to YAML or JSON, inline JSON, or a dict"),
        (5, "steer config is 5; expected"),
        (["a"], r"steer config is \['a'\]; expected"),
        ({"steers": 5}, "steers is 5"),
        ("steers:\n" + "  a: {path: a.safetensors}\n" * 40, "steer config"),
        ("~no-such-user-anywhere/steers.yaml", "steer config"),
        ("a\0b", "steer config"),
        ('{"steers": ' + "9" * 5000 + "}", "steer config"),
    ],
    ids=[
        "missing",
        "empty",
        "folder",
        "brace",
        "half-json",
        "none",
        "number",
        "list",
        "wrong-dict",
        "yaml-text-for-a-path",
        "unknown-user",
        "null-byte",
        "huge-number",
    ],
)
def test_a_source_that_is_not_a_config_is_refused(source: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        SteerConfig.load(source)


def test_a_config_file_in_another_encoding_is_refused(folder: Path) -> None:
    (folder / "steers.yaml").write_bytes(b"\xff\xfe\x00\xd8bad\x80")
    with pytest.raises(SteerError, match=r"steers.yaml is neither YAML nor JSON"):
        SteerConfig.load(folder / "steers.yaml")


def plan_of(folder: Path, text: str) -> SteerPlan:
    return SteerPlan.of(load_yaml(folder, text))


def test_a_plan_describes_its_steers(folder: Path) -> None:
    plan = plan_of(folder, yaml.safe_dump(FULL))
    a, b = plan.steers["a"], plan.steers["b"]
    assert (a.kind, a.site, a.layers, a.default_strength) == ("lm_steer", "head", None, 2.0)
    assert (b.kind, b.site, b.layers, b.default_strength) == ("lm_steer", "head", None, -8.0)
    assert a.content == content_digest(load_steer(folder / "a.safetensors"))
    assert a.content != b.content


def test_a_steer_without_a_default_strength_takes_one(folder: Path) -> None:
    plan = plan_of(folder, "steers: {b: {path: b.safetensors}}")
    assert plan.doses("b") == (Dose("b", 1.0),)


def test_a_plan_is_unchanged_by_json(folder: Path) -> None:
    plan = plan_of(folder, yaml.safe_dump(FULL))
    restored = json.loads(json.dumps(plan.to_json()))
    assert is_plan(restored)
    assert SteerPlan.from_json(restored) == plan


def test_a_users_config_is_not_read_as_a_plan() -> None:
    assert not any(map(is_plan, [FULL, "steers.yaml", None, {}, {"steers": {}}]))


def test_a_planned_steer_loads_with_the_overrides_of_the_config(folder: Path) -> None:
    steer = plan_of(folder, yaml.safe_dump(FULL)).steers["b"].load()
    assert (steer.epsilon, steer.default_strength) == (0.5, -8.0)
    saved = load_steer(folder / "b.safetensors")
    assert torch.equal(steer.tensors["add"], saved.tensors["add"])


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_steer_file_that_changes_during_the_start_is_noticed(
    folder: Path, make_steer: Any, change: str
) -> None:
    planned = plan_of(folder, A).steers["a"]
    if change == "replaced":
        save_steer(make_steer(columns=2, rank=3), folder / "a.safetensors")
    else:
        (folder / "a.safetensors").unlink()
    message = "the file changed while" if change == "replaced" else "does not exist"
    with pytest.raises(SteerError, match=rf"a\.safetensors: {message}"):
        planned.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steers: {x: {path: gone.pt}}", r"steer x: .*gone\.pt: does not exist"),
        ("steers: {x: {path: steers.yaml}}", r"steer x: .*steers\.yaml: neither a safetensors"),
        ("steers: {x: {path: .}}", r"steer x: .*: is a folder; give one: a\.safetensors, b"),
        ("steers: {x: {path: ''}}", r"steer x: .*: is a folder; give one: a\.safetensors, b"),
        ("steers: {x: {path: ~no-such-user-anywhere/x.pt}}", "steer x"),
        (
            A + "limits: {max_rank: 2}",
            r"steer a: .*a\.safetensors: rank is 3; limits.max_rank is 2",
        ),
        (A + "default: happy", "default: steer 'happy' is unknown; steers: a"),
        (A + "default: 'a:x'", "default: steer a has strength 'x'"),
        (A + "default: 'a:9'\nlimits: {max_strength: 8}", "default: steer a has strength 9; allow"),
        (
            A + "presets: {p: {a: 9}}\nlimits: {max_strength: 8}",
            "preset p: steer a has strength 9; allowed: -8 to 8",
        ),
        (
            "steers: {a: {path: a.safetensors}, b: {path: b.safetensors}}\n"
            "presets: {p: {a: 1, b: 1}}\nlimits: {max_steers_per_request: 1}",
            "preset p: 2 steers are asked for; at most 1",
        ),
        ("steers: {a: {path: a.safetensors, columns: [2]}}", r"columns \[2\]: .* columns 0 to 1"),
        ("steers: {a: {path: a.safetensors, hidden_size: 7}}", "width is 6 but hidden_size is 7"),
    ],
    ids=[
        "missing-file",
        "no-steer-file",
        "folder",
        "empty-path",
        "unknown-user",
        "rank",
        "default-unknown",
        "default-number",
        "default-strength",
        "preset-strength",
        "preset-count",
        "columns",
        "hidden-size",
    ],
)
def test_a_config_that_cannot_be_served_stops_the_start(
    folder: Path, text: str, message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        plan_of(folder, text)


def test_a_steer_at_the_rank_limit_is_admitted(folder: Path) -> None:
    assert plan_of(folder, A + "limits: {max_rank: 3}").steers["a"].load().rank == 3


def test_the_same_file_under_two_names_is_two_steers(folder: Path) -> None:
    both = {
        "steers": {n: {"path": "a.safetensors", "columns": [c]} for n, c in [("x", 0), ("y", 1)]}
    }
    plan = plan_of(folder, yaml.safe_dump(both))
    assert [plan.steers[name].load().columns for name in ("x", "y")] == [1, 1]
