"""Files of other tools: recognised by content, restricted by overrides, refused when damaged."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from untrusted_text_tools import (
    SIGNED,
    directions,
    write_concept,
    write_gguf,
    write_npz,
    write_saelens,
    write_svec,
)

from vllm_steer import SteerConfig, SteerError, load_steer, save_steer

FUZZ = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_persona(path: Path) -> Path:
    torch.save(torch.arange(12.0).view(4, 3), path)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "concept": lambda path: write_concept(path, a=SIGNED),
    "gguf": lambda path: write_gguf(path, directions([1, 2])),
    "svec": lambda path: write_svec(path, directions([1, 2])),
    "saelens": write_saelens,
    "npz": write_npz,
    "persona": write_persona,
}
ENOUGH: dict[str, dict[str, Any]] = {
    "persona": {"rows": "1-3", "layers": "0-2"},
    "saelens": {"feature": 1, "hook": "blocks.1.hook_resid_post"},
    "npz": {"feature": 1, "hook": "blocks.1.hook_resid_post"},
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("ending", ["pt", "safetensors", "gguf", "json"])
def test_the_file_name_does_not_matter(tmp_path: Path, name: str, ending: str) -> None:
    path = WRITERS[name](tmp_path / f"steer.{ending}")
    assert load_steer(path, **ENOUGH.get(name, {})).kind == "vector"


@pytest.mark.parametrize("name", ENOUGH)
def test_a_config_and_a_plan_carry_the_overrides_of_a_format(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / "steer")
    config = SteerConfig.load({"steers": {"it": {"path": str(path), **ENOUGH[name]}}})
    overrides = json.loads(json.dumps(config.steers["it"].overrides))
    assert torch.equal(
        load_steer(path, **overrides).vectors, load_steer(path, **ENOUGH[name]).vectors
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here fails when read")
def test_a_file_that_the_system_cannot_read_is_refused() -> None:
    with pytest.raises(SteerError, match=r"/proc/self/mem: cannot be read \("):
        load_steer("/proc/self/mem")


@pytest.mark.parametrize("name", WRITERS)
def test_a_converted_steer_can_be_saved_and_loaded(tmp_path: Path, name: str) -> None:
    steer = load_steer(WRITERS[name](tmp_path / "theirs"), **ENOUGH.get(name, {}))
    save_steer(steer, tmp_path / "own")
    loaded = load_steer(tmp_path / "own")
    assert (loaded.layers, loaded.site, loaded.mode) == (steer.layers, steer.site, steer.mode)
    assert torch.equal(loaded.vectors, steer.vectors)


USED = {("concept", "orient"), ("persona", "rows")} | {
    (name, fact) for name in ("saelens", "npz") for fact in ("feature", "hook")
}
GIVEN: dict[str, Any] = {"orient": True, "rows": "1", "feature": 1, "hook": "x", "kind": "lm_steer"}


@pytest.mark.parametrize(
    ("name", "fact"), [pair for pair in product(WRITERS, GIVEN) if pair not in USED]
)
def test_an_override_without_a_use_is_refused(tmp_path: Path, name: str, fact: str) -> None:
    overrides = {**ENOUGH.get(name, {}), fact: GIVEN[fact]}
    with pytest.raises(
        SteerError,
        match=r"does not apply to|the key kind is lm_steer|cannot be " r"a steer of kind",
    ):
        load_steer(WRITERS[name](tmp_path / "steer"), **overrides)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    path = WRITERS[name](tmp_path / "steer")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SteerError, match="steer: "):
        load_steer(path, **ENOUGH.get(name, {}))


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: write(folder / name).read_bytes() for name, write in WRITERS.items()}


@FUZZ
@pytest.mark.parametrize("name", WRITERS)
@given(position=st.integers(0, 100_000), value=st.binary(min_size=1, max_size=4))
def test_changed_bytes_give_a_steer_or_a_steer_error(
    tmp_path: Path, valid_files: dict[str, bytes], name: str, position: int, value: bytes
) -> None:
    data = bytearray(valid_files[name])
    at = position % len(data)
    data[at : at + len(value)] = value
    path = tmp_path / "changed"
    path.write_bytes(data)
    try:
        assert load_steer(path, **ENOUGH.get(name, {})).kind == "vector"
    except SteerError as error:
        assert str(path) in str(error)
