"""The serving benchmark runs from start to end and writes the figures that it promises; its parts
read vLLM's results, make the requests and compare answers as they say."""

import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rounds
from benchmarks.serving import answers, cases, model, processes, vllm_bench

ROOT = Path(__file__).parents[1]
KEYS = {
    "what",
    "distinct",
    "concurrency",
    "rank",
    "requests",
    "input_len",
    "output_len",
    "rounds",
}
FIGURES = ("tok_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")
START_TO_END_S = 1500  # the fixture's run takes minutes where others use the cores
PARTS = ("", "_ratio", "_ratio_p20", "_ratio_p80")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("serving") / "result.json"
    options = ["--shape", "tiny", "--rank", "16", "--quick", "--json", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bench_serving", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = process.communicate()
    finally:  # a test that runs out of time leaves no server behind
        process.terminate()
        process.wait(120)
    assert process.returncode == 0, errors[-6000:]
    return json.loads(path.read_text())


@pytest.mark.matrix
@pytest.mark.timeout(START_TO_END_S)
def test_a_result_names_the_machine_and_the_versions(result: dict[str, Any]) -> None:
    assert {"benchmark", "machine", "versions", "git", "command", "date"} <= set(result)
    assert (result["benchmark"], result["shape"], result["dtype"]) == (
        "serving",
        "tiny",
        "bfloat16",
    )
    assert "--quick" in result["command"]


@pytest.mark.matrix
@pytest.mark.timeout(START_TO_END_S)
def test_every_kind_is_measured_without_steers_and_with_them(result: dict[str, Any]) -> None:
    cases = [(row["what"], row["distinct"], row["rank"]) for row in result["rows"]]
    assert cases == [
        ("loaded", 0, 0),
        ("steered", 2, 16),
        ("idle", 0, 0),
        ("guided", 2, 0),
    ]


@pytest.mark.matrix
@pytest.mark.timeout(START_TO_END_S)
def test_figures_and_ratios_are_finite_and_ordered(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert set(row) == KEYS | {figure + part for figure in FIGURES for part in PARTS}
        for figure in FIGURES:
            values = [row[figure + part] for part in PARTS]
            assert all(math.isfinite(number) and number >= 0 for number in values)
            low, middle, high = (row[f"{figure}_ratio{part}"] for part in ("_p20", "", "_p80"))
            assert low <= middle <= high


def serve_result(**changes: Any) -> dict[str, Any]:
    """A result file of `vllm bench serve`, of two requests with three tokens each."""
    figures = {
        "output_throughput": 4.5,
        "p50_ttft_ms": 20.0,
        "p99_ttft_ms": 30.0,
        "p50_tpot_ms": 5.0,
        "p99_tpot_ms": 6.0,
        "mean_tpot_ms": 5.5,
    }
    return {"completed": 2, "failed": 0, "total_output_tokens": 6, **figures, **changes}


def test_the_figures_of_bench_serve_are_read() -> None:
    legs = vllm_bench.figures(serve_result(), vllm_bench.RequestLoad(2, 4, 3, 1))
    assert legs == {
        "tok_per_s": 4.5,
        "ttft_p50_ms": 20.0,
        "ttft_p99_ms": 30.0,
        "tpot_p50_ms": 5.0,
        "tpot_p99_ms": 6.0,
    }


@pytest.mark.parametrize(
    "changes",
    [{"completed": 1}, {"failed": 1}, {"total_output_tokens": 5}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_leg_of_bench_serve_with_less_work_is_refused(changes: Any) -> None:
    with pytest.raises(AssertionError, match="completed, failed, output tokens"):
        vllm_bench.figures(serve_result(**changes), vllm_bench.RequestLoad(2, 4, 3, 1))


@pytest.mark.parametrize("warm_up", [True, False])
def test_every_leg_of_a_case_lies_between_two_plain_legs(warm_up: bool) -> None:
    order: list[str] = []

    def leg(name: str) -> int:
        order.append(name)
        return len(order)

    legs = rounds.interleave(
        lambda: leg("A"), {name: partial(leg, name) for name in "bc"}, 2, warm_up=warm_up
    )
    assert "".join(order) == "Abc" * warm_up + "AbAcAbAcA"
    for key, measured in legs.items():
        assert len(measured) == 2
        for one in measured:
            assert (one.before + 1, one.after - 1) == (one.other, one.other)
            assert order[one.other - 1] == key
    assert rounds.plain_legs(legs["b"]) == [n + 3 * warm_up for n in (1, 3, 5, 7)]


def test_a_line_has_every_figure_over_the_mean_of_both_stock_legs() -> None:
    measured = [rounds.Round({"ms": 1.0}, {"ms": case}, {"ms": 3.0}) for case in (2.0, 3.0, 4.0)]
    line = cases.line("guided", 1, vllm_bench.RequestLoad(8, 4, 3, 8), measured)
    assert {key: line[key] for key in line if key.startswith(("ms", "rounds"))} == {
        "rounds": 3,
        "ms": 3.0,
        "ms_ratio": 1.5,
        "ms_ratio_p20": 1.2,
        "ms_ratio_p80": 1.8,
    }


def test_requests_carry_as_many_model_names_as_there_are_distinct_steers() -> None:
    served = model.ServedModel(Path("model"), None, {})
    assert served.models("guided", 3) == ["base:guided0", "base:guided1", "base:guided2"]
    assert served.models("guided", 0) == ["base"]


def test_token_ids_decode_to_a_text_of_as_many_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model.write_tokenizer(512, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [0, 511, 7, 7, 300]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert len(tokenizer) == 512


def test_an_answer_is_read_from_a_response() -> None:
    logprobs = {"tokens": ["token_id:7", "token_id:9"], "token_logprobs": [-1.5, -2.0]}
    answer = answers.answer_of({"choices": [{"logprobs": logprobs}]})
    assert (answer.tokens, answer.logprobs) == ((7, 9), (-1.5, -2.0))


def test_a_request_for_an_answer_names_its_steer_by_its_model() -> None:
    body = answers.completion_body("base:steered0", (5, 6))
    assert (body["model"], body["prompt"]) == ("base:steered0", [5, 6])
    assert (body["temperature"], body["ignore_eos"], body["logprobs"]) == (0, True, 1)
    assert not {"steer", "vllm_xargs"} & set(body)


def test_a_steer_without_effect_on_any_one_prompt_fails_the_check() -> None:
    plain = [answers.ServedAnswer((1, 2), (-1.0, -2.0)), answers.ServedAnswer((3,), (-1.0,))]
    steered = [answers.ServedAnswer((1, 2), (-1.0, -2.5)), answers.ServedAnswer((3,), (-1.5,))]
    answers.check_effect(plain, steered, "steered0")
    for without in (plain, [steered[0], plain[1]]):
        with pytest.raises(AssertionError, match=r"steered0, prompt \d: the steer had no"):
            answers.check_effect(plain, without, "steered0")


def test_an_unsteered_answer_that_differs_in_one_logprob_fails_the_check() -> None:
    stock = [answers.ServedAnswer((1, 2), (-1.0, -2.0))]
    answers.check_equal(stock, list(stock), "loaded")
    with pytest.raises(AssertionError, match="loaded, prompt 0"):
        answers.check_equal(stock, [answers.ServedAnswer((1, 2), (-1.0, -2.0000002))], "loaded")


@pytest.mark.parametrize("check", ["check_equal", "check_effect"])
def test_answers_that_are_missing_or_not_finite_fail_both_checks(check: str) -> None:
    stock = [answers.ServedAnswer((1,), (-1.0,))]
    with pytest.raises(AssertionError, match="loaded"):
        getattr(answers, check)(stock, [], "loaded")
    with pytest.raises(AssertionError, match="not finite"):
        getattr(answers, check)(stock, [answers.ServedAnswer((1,), (math.nan,))], "loaded")


def test_the_log_of_a_child_that_fails_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import sys; print('the reason'); sys.exit(3)"
    with pytest.raises(RuntimeError, match=r"ended: 3[^$]*the reason"):
        processes.run(["-c", script], log, plugin=True)


def test_processes_of_a_child_end_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(other.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with processes.child(["-c", script], log, plugin=True) as process:
        while not log.read_text().strip():
            assert process.poll() is None
        other = int(log.read_text())
    assert process.returncode is not None
    deadline = time.monotonic() + 10
    while is_running(other):
        assert time.monotonic() < deadline


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended may still wait for its parent to notice."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_the_plugin_is_off_in_children_of_stock_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STEER_DISABLE", "1")
    monkeypatch.setenv("VLLM_STEER_ACTIVE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    environment = processes.environment
    assert environment(plugin=False)["VLLM_STEER_DISABLE"] == "1"
    assert "VLLM_STEER_DISABLE" not in environment(plugin=True)
    assert "VLLM_STEER_ACTIVE" not in environment(plugin=True)
    assert environment(plugin=True)["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment(plugin=True)["OMP_WAIT_POLICY"] == "passive"
