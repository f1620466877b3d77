"""Untrusted files and configs: refused in one line or harmless, on every input path.

Each is read in its own process with 4 GiB of memory and 20 seconds. No code of a file may run (it
would create ``CANARY``), and no process may end by a signal, by a traceback or by its limits.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS
from formats import FORMATS, variants
from outside import HOSTILE_SAMPLES, needs
from steer_files import STEER_FILES
from text_files import TEXT_FILES

from vllm_steer import VectorSteer, save_steer

HERE = Path(__file__).parent
SEED = 7
MEMORY = 600 * 2**20
"""What a file of some bytes may take beside what the process had: 4 * 64 MiB, and libraries."""
SECONDS = 15.0
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
FILES_OF_A_KIND, CONFIGS_OF_A_KIND, TEXTS_OF_A_KIND = 14, 18, 10
NEVER_LOADED = {
    "calls",
    "text_protocol",
    "extensions",
    "other_case",
    "two_pickles",
    "same_name_twice",
    "odd_folder",
    "encrypted",
    "compressed",
    "odd_persistent",
    "shared_lists",
    "holds_itself",
    "odd_machine",
    "noise",
    "many_tensors",
    "one_tensor_often",
    "junk_around",
    "not_torch",
    "overlapping_gguf",
    "views_with_metadata",
    "without_values",
}


def some_and_all(of_each_kind: int) -> Any:
    """Two files of every kind in ``make test``, all in the matrix."""
    whole = pytest.param(of_each_kind, marks=pytest.mark.matrix)
    return pytest.mark.parametrize("files_per_kind", [1, whole], ids=["some", "all"])


FACTS: tuple[dict[str, Any], ...] = (
    {},
    {"layers": "1"},
    {"epsilon": 0.1, "columns": [0]},
    {"feature": 0, "hook": "blocks.1.hook_resid_post"},
)


def outcomes(jobs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outcome of each job, in order."""
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, str(HERE / "children.py")],
        input=lines,
        capture_output=True,
        text=True,
        env=environment,
        timeout=560,
    )
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(results) == lines.count("\n"), process.stderr[-3000:]
    return results


def faults(outcome: dict[str, Any]) -> Iterator[str]:
    """The faults of an outcome."""
    for ended in ("signal", "too_long", "traceback"):
        if ended in outcome:
            yield f"{ended} {outcome[ended]}"
            return
    if outcome["seconds"] > SECONDS:
        yield f"{outcome['seconds']:.1f} s"
    if outcome["memory"] > MEMORY:
        yield f"{outcome['memory'] / 2**20:.0f} MiB"
    refused = outcome.get("refused")
    if refused is not None:
        if outcome["error"] != "SteerError" or not refused.isprintable():
            yield f"{outcome['error']}: {refused!r}"
        if len(refused) > 1000 or "weights_only" in refused:
            yield f"says {refused!r}"
    yield from _faults_of_command(outcome)


def _faults_of_command(outcome: dict[str, Any]) -> Iterator[str]:
    for stream in ("stdout", "stderr"):
        text = outcome[stream].encode("latin-1").decode("utf-8", "replace")
        if CONTROL.search(text) or "Traceback" in text:
            yield f"{stream}: {text[-1500:]!r}"
    message = outcome.get("said", "")
    if message.startswith("exit") and message not in ("exit 0", "exit 1"):
        yield message
    if message == "exit 1" and (
        not outcome["stderr"].startswith("vllm-steer: ") or outcome["stderr"].count("\n") != 1
    ):
        yield f"stderr: {outcome['stderr']!r}"


def check(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the jobs; fails with each fault, and with each canary."""
    results = outcomes(jobs)
    problems = [f"{one['name']}: {fault}" for one in results for fault in faults(one)]
    folders = {job["folder"] for job in jobs}
    problems += [f"executed in {folder}" for folder in folders if Path(folder, "CANARY").exists()]
    assert not problems, f"{len(problems)} of {len(jobs)}\n" + "\n".join(problems[:20])
    return results


def written(folder: Path, files: Iterable[tuple[str, bytes]], ending: str) -> dict[str, Path]:
    paths = {}
    for name, data in files:
        paths[name] = folder / f"{name}{ending}"
        paths[name].write_bytes(data)
    return paths


def steer_files(folder: Path, count: int) -> dict[str, Path]:
    (folder / "files").mkdir()
    return written(folder / "files", STEER_FILES.files(SEED, count), ".pt")


def test_the_corpus_has_the_documented_size() -> None:
    assert len(STEER_FILES.makers) >= 40
    assert sum(1 for _ in STEER_FILES.files(SEED, FILES_OF_A_KIND)) >= 500
    assert sum(1 for _ in CONFIGS.files(SEED, CONFIGS_OF_A_KIND)) >= 300
    first, again = (dict(STEER_FILES.files(SEED, 1)) for _ in range(2))
    assert first == again


@some_and_all(FILES_OF_A_KIND)
def test_hostile_steer_files_are_refused_or_harmless(tmp_path: Path, files_per_kind: int) -> None:
    jobs = [
        {"does": "load", "name": f"{name} {overrides}", "path": str(path), "overrides": overrides}
        for number, (name, path) in enumerate(steer_files(tmp_path, files_per_kind).items())
        for overrides in ({}, FACTS[number % len(FACTS)])
    ]
    results = check([job | {"folder": str(tmp_path)} for job in jobs])
    loaded = {one["name"].split("-")[0] for one in results if "said" in one}
    assert not loaded & NEVER_LOADED


@some_and_all(CONFIGS_OF_A_KIND)
def test_hostile_configs_are_refused_or_harmless(tmp_path: Path, files_per_kind: int) -> None:
    steer = VectorSteer(vectors=torch.ones(4, 4), layers=(0, 1, 2, 3))
    for name in ("a", "b"):
        save_steer(steer, tmp_path / f"{name}.safetensors")
    paths = written(tmp_path, CONFIGS.files(SEED, files_per_kind), ".yaml")
    assert len(paths) == files_per_kind * len(CONFIGS.makers)
    jobs = [
        {"does": "start", "name": name, "path": str(path), "folder": str(tmp_path)}
        for name, path in paths.items()
    ]
    results = check(jobs)
    assert sum("refused" in one for one in results) > 0.6 * len(results)
    planned = {one["name"].split("-")[0] for one in results if "said" in one}
    assert not planned & {"bomb", "merge_bomb", "holds_itself", "twice"}


@some_and_all(TEXTS_OF_A_KIND)
@pytest.mark.parametrize("ending", [".txt", ".csv", ".json", ".jsonl", ".yaml"])
def test_hostile_texts_are_refused_or_harmless(
    tmp_path: Path, ending: str, files_per_kind: int
) -> None:
    paths = written(tmp_path, TEXT_FILES.files(SEED, files_per_kind), ending)
    os.mkfifo(tmp_path / f"pipe{ending}")
    (tmp_path / f"zeros{ending}").symlink_to("/dev/zero")
    paths |= {name: tmp_path / f"{name}{ending}" for name in ("pipe", "zeros")}
    readers = ("lexicon", "properties") if ending == ".yaml" else ("rows", "conversations")
    jobs = [
        {"does": reader, "name": f"{reader} {name}", "path": str(path), "folder": str(tmp_path)}
        for name, path in paths.items()
        for reader in readers
    ]
    results = check(jobs)
    assert {one["name"].split()[1] for one in results if "said" in one}.isdisjoint(
        {"pipe", "zeros"}
    )


@pytest.mark.matrix
def test_hostile_files_in_a_config_stop_the_start(tmp_path: Path) -> None:
    jobs = [
        {
            "does": "start",
            "name": name,
            "config": {"steers": {"a": {"path": str(path)}}},
            "folder": str(tmp_path),
        }
        for name, path in steer_files(tmp_path, 5).items()
    ]
    check(jobs)


@pytest.mark.matrix
@pytest.mark.parametrize("command", ["convert", "inspect", "eval"])
def test_hostile_files_end_a_command_in_one_line(tmp_path: Path, command: str) -> None:
    corpus = steer_files(tmp_path, 5)
    if command == "eval":  # a steer that loads would have its texts generated
        corpus = {k: path for k, path in corpus.items() if k.rpartition("-")[0] in NEVER_LOADED}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    for_each = {
        "convert": lambda path, to: ["convert", path, f"{to}.safetensors"],
        "inspect": lambda path, to: ["inspect", path],
        "eval": lambda path, to: [
            *("eval", "embedded", path, "--prompts", str(prompts), "--out", to),
            *("--strengths", "1", "--no-plot"),
        ],
    }[command]
    jobs = [
        {
            "does": "command",
            "name": f"{command} {name}",
            "command": for_each(str(path), str(tmp_path / f"out-{name}")),
            "folder": str(tmp_path),
        }
        for name, path in corpus.items()
    ]
    results = check(jobs)
    if command == "convert":
        for name, one in zip(corpus, results, strict=True):
            assert (tmp_path / f"out-{name}.safetensors").exists() == (one["said"] == "exit 0")


@pytest.mark.matrix
@pytest.mark.parametrize("of", FORMATS)
def test_changed_files_of_every_format_give_a_steer_or_one_line(of: str, tmp_path: Path) -> None:
    whole, overrides = FORMATS[of](tmp_path)
    paths = written(tmp_path, variants(whole, SEED, 300), ".changed")
    jobs = [
        {
            "does": "load",
            "name": name,
            "path": str(path),
            "overrides": overrides,
            "folder": str(tmp_path),
        }
        for name, path in paths.items()
    ]
    results = check(jobs)
    assert sum("refused" in one for one in results) > 30


@pytest.mark.matrix
@pytest.mark.parametrize("of", ["checkpoint", "by_layer", "plain_tensor"])
def test_changed_files_are_read_as_pytorch_reads_them(of: str, tmp_path: Path) -> None:
    whole, _ = FORMATS[of](tmp_path)
    files = {**dict(variants(whole, SEED, 1000)), "whole": whole}
    jobs = [
        {"does": "agree", "name": name, "path": str(path), "folder": str(tmp_path)}
        for name, path in written(tmp_path, files.items(), ".changed").items()
    ]
    verdicts = {one["name"]: one.get("said") for one in check(jobs)}
    assert verdicts["whole"] == "the same"
    assert sum(verdict == "the same" for verdict in verdicts.values()) > 20


@needs(HOSTILE_SAMPLES)
def test_the_sample_files_are_refused_or_harmless(tmp_path: Path) -> None:
    jobs = [
        {
            "does": "start" if path.suffix == ".yaml" else "load",
            "name": path.name,
            "path": str(path),
            "overrides": {"feature": 0, "hook": "blocks.1.hook_resid_post"}
            if "npz" in path.name
            else {},
            "folder": str(tmp_path),
        }
        for path in sorted(HOSTILE_SAMPLES.iterdir())
    ]
    results = check(jobs)
    assert {one["name"] for one in results if "said" in one} == {"m_markup.st"}
