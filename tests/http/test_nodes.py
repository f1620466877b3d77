"""Two nodes on loopback that do not have the same steer config."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from server_process import (
    end,
    environment,
    free_port,
    random_steers,
    serve_command,
    tail,
    write_config,
)

pytestmark = pytest.mark.matrix
LIMIT_S = 300


def other_plan(config: Path) -> Path:
    """A config of the same steers with another default."""
    path = config.with_name("other.yaml")
    path.write_text(config.read_text() + "default: friendly\n")
    return path


def data_parallel(config: Path) -> dict[str, list[str]]:
    """Two engines; the second one is not steered."""
    shared = [
        "--data-parallel-size=2",
        "--data-parallel-size-local=1",
        "--data-parallel-address=127.0.0.1",
        f"--data-parallel-rpc-port={free_port()}",
    ]
    return {
        "first": [*shared, f"--port={free_port()}", f"--steer-config={config}"],
        "second": [*shared, "--headless", "--data-parallel-start-rank=1"],
    }


def tensor_parallel(config: Path) -> dict[str, list[str]]:
    """Two ranks of one engine; the second one has another plan."""
    shared = [
        "--tensor-parallel-size=2",
        "--nnodes=2",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
    ]
    second = f"--steer-config={other_plan(config)}"
    return {
        "first": [*shared, "--node-rank=0", f"--port={free_port()}", f"--steer-config={config}"],
        "second": [*shared, "--node-rank=1", "--headless", second],
    }


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        (data_parallel, "a data-parallel engine is not steered as this frontend is"),
        (tensor_parallel, "ranks 1 and 0 have different steer plans"),
    ],
    ids=["data-parallel", "tensor-parallel"],
)
def test_a_node_with_another_steer_config_stops_the_start(
    tmp_path: Path, commands: Callable[[Path], dict[str, list[str]]], message: str
) -> None:
    config = write_config(tmp_path, random_steers())
    nodes = {}
    try:
        for name, options in commands(config).items():
            with (tmp_path / name).open("wb") as log:
                nodes[name] = subprocess.Popen(
                    serve_command(*options),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment() | {"VLLM_HOST_IP": "127.0.0.1"},
                    start_new_session=True,
                )
        try:
            code = nodes["first"].wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the first node still runs:\n{tail(tmp_path / 'first')}")
    finally:
        for node in nodes.values():
            end(node)
    assert code != 0
    log_text = (tmp_path / "first").read_text(errors="replace")
    assert f"{message}: start every node with the same --steer-config" in log_text
