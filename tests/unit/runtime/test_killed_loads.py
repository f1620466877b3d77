"""A process that is killed while it loads steers, and a state folder that was damaged."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from loading_tools import fake_engines, lm_steer, loading_plan, steer_loading

from vllm_steer import SteerError, load_steer, save_steer
from vllm_steer.runtime.registry import FILE, Registry
from vllm_steer.runtime_config import RuntimeConfig
from vllm_steer.serving.runtime.loading import SteerLoading, SteerSource
from vllm_steer.serving.runtime.shared_folder import prepare_server

ROUNDS, SEED = 10, 5
LOADER = Path(__file__).parents[1] / "repeated_loads.py"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def loading_in(state: Path) -> SteerLoading:
    plan = loading_plan(state=str(state), unprotected=True)
    return steer_loading(plan, state, fake_engines(plan))


def restart(state: Path) -> SteerLoading:
    """What a server does with the folder before it serves."""
    prepare_server(RuntimeConfig(enabled=True, unprotected=True, state=state))
    loading = loading_in(state)
    asyncio.run(loading.restore())
    return loading


def loaded(state: Path, count: int = 2) -> SteerLoading:
    """A server's part with steers ``0``, ``1``, ... that were loaded from bytes."""
    loading = loading_in(state)
    for seed in range(count):
        save_steer(lm_steer(seed), state.parent / "whole")
        source = SteerSource((state.parent / "whole").read_bytes(), {})
        asyncio.run(loading.load(str(seed), source, in_place=False))
    return loading


def assert_only_whole_files(state: Path, names: SteerLoading) -> None:
    steers = names.registry.names().steers
    files = {path.name for path in state.iterdir()}
    assert files == {steer.path.name for steer in steers.values()} | ({FILE, "lock"} & files)
    for steer in steers.values():
        load_steer(steer.path)


@pytest.mark.matrix
def test_a_process_that_is_killed_at_any_time_leaves_whole_files(state: Path) -> None:
    rng, counts = Random(SEED), []
    command = [sys.executable, str(LOADER), str(state)]
    python_path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": python_path, "VLLM_LOGGING_LEVEL": "ERROR"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(ROUNDS):
            process.stdin.write("start\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
            time.sleep(rng.uniform(0.01, 0.4))
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == f"ended by {int(signal.SIGKILL)}\n"
            text = (state / FILE).read_text() if (state / FILE).exists() else '{"steers": {}}'
            named = json.loads(text)["steers"]
            for steer in named.values():  # before a restart has tidied up
                load_steer(steer["path"])
            again = restart(state)
            assert_only_whole_files(state, again)
            (core,) = again.engines.cores  # type: ignore[attr-defined]
            keys = sorted({str(steer["key"]) for steer in named.values()})
            assert core.contents() == [keys, keys]
            counts.append(len(named))
        process.stdin.close()
    assert any(counts)


def test_a_restart_loads_what_was_loaded_and_removes_what_was_left(state: Path) -> None:
    before = loaded(state).registry.names().steers
    for left in (".upload-x", ".loaded-steers.json.0123456789abcdef.unfinished", "x.safetensors"):
        (state / left).write_text("half")
    (state / ".x.safetensors.0123456789abcdef.unfinished").write_text("half")
    again = restart(state)
    assert again.registry.names().steers == before
    files = {path.name for path in state.iterdir()} - {FILE, "lock"}
    assert files == {steer.path.name for steer in before.values()}


def test_a_start_leaves_the_files_of_a_server_that_is_loading(state: Path) -> None:
    registry = Registry(state)
    lock = registry.try_lock()
    assert lock is not None
    (state / "x.safetensors").write_text("half")
    prepare_server(RuntimeConfig(enabled=True, unprotected=True, state=state))
    assert (state / "x.safetensors").exists()
    Registry.unlock(lock)


def test_a_missing_state_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match=r"runtime\.state: .*/no is no folder; make it"):
        prepare_server(RuntimeConfig(enabled=True, unprotected=True, state=tmp_path / "no"))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": _cut,
    "changed": _flip,
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_steer_of_the_state_stops_the_start(state: Path, damage: str) -> None:
    steers = loaded(state).registry.names().steers
    DAMAGE[damage](steers["1"].path)
    with pytest.raises(SteerError, match="steer 1, loaded before the restart, cannot be") as error:
        restart(state)
    assert f"remove it from {state / FILE}" in str(error.value)
    assert steers["1"].path.name in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "emptied"])
def test_a_damaged_list_of_names_stops_the_start(state: Path, damage: str) -> None:
    loaded(state)
    DAMAGE[damage](state / FILE)
    with pytest.raises(SteerError, match=FILE):
        prepare_server(RuntimeConfig(enabled=True, unprotected=True, state=state))
