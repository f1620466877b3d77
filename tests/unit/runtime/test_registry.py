"""The names of loaded steers, in a file that several processes read."""

import json
import math
import os
import time
from pathlib import Path

import pytest
from loading_tools import loading_plan

from vllm_steer import SteerError
from vllm_steer.planned_steer import PlannedSteer
from vllm_steer.runtime.registry import FILE, Registry


def planned(content: str, **fields: object) -> PlannedSteer:
    defaults = {
        "path": Path("/x"),
        "overrides": {},
        "kind": "lm_steer",
        "site": "head",
        "hidden_size": 6,
        "default_strength": 1.0,
    }
    return PlannedSteer(**{**defaults, "content": content, **fields}).as_loaded  # type: ignore[arg-type]


def test_what_one_process_writes_another_reads(tmp_path: Path) -> None:
    one, other = Registry(tmp_path), Registry(tmp_path)
    assert other.names().steers == {}
    one.write({"a": planned("1"), "b": planned("2")})
    assert other.names().steers == {"a": planned("1"), "b": planned("2")}
    one.write({"b": planned("3")})
    assert other.names().steers == {"b": planned("3")}
    assert other.names() is other.names()  # read again only if the file has changed


def test_a_bound_that_is_infinite_is_kept(tmp_path: Path) -> None:
    steer = planned("1", mode="project", has_bounds=True, low=0.5, high=math.inf)
    Registry(tmp_path).write({"floor": steer})
    assert Registry(tmp_path).names().steers == {"floor": steer}


def test_the_key_is_of_all_that_a_dose_takes_from_a_steer() -> None:
    keys = {
        planned("1").key,
        planned("2").key,
        planned("1", default_strength=2.0).key,
        planned("1", where_present=True).key,
        planned("1", schedule="dim").key,
    }
    assert len(keys) == 5
    assert planned("1", path=Path("/y")).key == planned("1").key


def test_a_value_has_the_keys_of_the_names_that_it_uses(tmp_path: Path) -> None:
    registry, plan = Registry(tmp_path), loading_plan()
    registry.write({"a": planned("1"), "b": planned("2")})
    names, keys = registry.names(), {"a": planned("1").key, "b": planned("2").key}
    assert names.loaded_by("a:2", plan) == {"a": keys["a"]}
    assert names.loaded_by({"b": {"strength": 1}}, plan) == {"b": keys["b"]}
    assert names.loaded_by(None, plan) == names.loaded_by("none", plan) == {}
    assert names.loaded_by("[", plan) == {}  # its error comes from the parser
    assert names.loaded_by("a,other", plan) == keys  # the error lists what there is
    assert all(key in plan.loaded for key in keys.values())


def test_a_requests_own_steers_come_first(tmp_path: Path) -> None:
    registry, plan = Registry(tmp_path), loading_plan()
    registry.write({"a": planned("1")})
    names = registry.names().with_steers({"a": planned("2")})
    assert names.loaded_by("a", plan) == {"a": planned("2").key}
    assert registry.names().loaded_by("a", plan) == {"a": planned("1").key}


def test_one_lock_at_a_time(tmp_path: Path) -> None:
    one, other = Registry(tmp_path), Registry(tmp_path)
    lock = one.try_lock()
    assert lock is not None
    assert other.try_lock() is None and one.try_lock() is None
    Registry.unlock(lock)
    again = other.try_lock()
    assert again is not None
    Registry.unlock(again)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a list of loaded steers of version 1; remove it to start with none"),
        (json.dumps({"version": 2, "steers": {}}), "of version 1"),
        (json.dumps({"version": 1}), "is damaged"),
        (json.dumps({"version": 1, "steers": {"a": {"path": "x"}}}), "is damaged"),
        (json.dumps({"version": 1, "steers": [1]}), "is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(SteerError, match=message) as refused:
        Registry(tmp_path).names()
    assert str(tmp_path / FILE) in str(refused.value)


def test_files_of_loads_that_a_killed_process_left_are_removed(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.write({"a": planned("1", path=tmp_path / "kept.safetensors")})
    old, new = time.time() - 7200, time.time()
    names = ("kept.safetensors", "left.safetensors", ".upload-1", "running.safetensors", "notes")
    for name in names:
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (new, new) if name.startswith("running") else (old, old))
    registry.remove_leftovers()
    left = {path.name for path in tmp_path.iterdir()} - {FILE}
    assert left == {"kept.safetensors", "running.safetensors", "notes"}
