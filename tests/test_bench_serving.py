"""The serving benchmark runs from start to end and writes the figures that it promises; its parts
read vLLM's results, make the requests and compare answers as they say."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KEYS = {
    "mode",
    "what",
    "distinct",
    "concurrency",
    "rate",
    "rank",
    "requests",
    "input_len",
    "output_len",
    "rounds",
}
FIGURES = {
    "serve": (
        "req_per_s",
        "tok_per_s",
        "ttft_p50_ms",
        "ttft_p99_ms",
        "tpot_p50_ms",
        "tpot_p99_ms",
    ),
    "throughput": ("req_per_s", "tok_per_s"),
    "latency": ("batch_p50_ms", "batch_p99_ms"),
}
START_TO_END_S = 1500  # the fixture's run takes minutes where others use the cores
PARTS = ("", "_stock", "_ratio", "_ratio_p20", "_ratio_p80")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("serving") / "result.json"
    options = ["--shape", "tiny", "--rank", "16", "--quick", "--json", str(path)]
    process = subprocess.Popen(
        [sys.executable, "benchmarks/bench_serving.py", *options],
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
def test_a_result_says_where_and_with_what_it_was_measured(result: dict[str, Any]) -> None:
    assert {"benchmark", "machine", "versions", "git", "command", "date"} <= set(result)
    assert (result["benchmark"], result["shape"], result["dtype"]) == (
        "serving",
        "tiny",
        "bfloat16",
    )
    assert "--quick" in result["command"]


@pytest.mark.matrix
@pytest.mark.timeout(START_TO_END_S)
def test_every_mode_and_kind_is_measured(result: dict[str, Any]) -> None:
    cases = [(row["mode"], row["what"], row["distinct"], row["rank"]) for row in result["rows"]]
    assert cases == [
        ("serve", "loaded", 0, 0),
        ("serve", "steered", 2, 16),
        ("serve", "idle", 0, 0),
        ("serve", "guided", 2, 0),
        ("throughput", "steered", 1, 16),
        ("latency", "guided", 1, 0),
    ]


@pytest.mark.matrix
@pytest.mark.timeout(START_TO_END_S)
def test_figures_and_ratios_are_finite_and_ordered(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        figures = FIGURES[row["mode"]]
        assert set(row) == KEYS | {figure + part for figure in figures for part in PARTS}
        for figure in figures:
            found = [row[figure + part] for part in PARTS]
            assert all(math.isfinite(number) and number >= 0 for number in found)
            low, middle, high = (row[f"{figure}_ratio{part}"] for part in ("_p20", "", "_p80"))
            assert low <= middle <= high


def serve_result(**changes: Any) -> dict[str, Any]:
    """A result file of `vllm bench serve`, of two requests with three tokens each."""
    figures = {
        "request_throughput": 1.5,
        "output_throughput": 4.5,
        "p50_ttft_ms": 20.0,
        "p99_ttft_ms": 30.0,
        "p50_tpot_ms": 5.0,
        "p99_tpot_ms": 6.0,
        "mean_tpot_ms": 5.5,
    }
    return {"completed": 2, "failed": 0, "total_output_tokens": 6, **figures, **changes}


def test_the_figures_of_bench_serve_are_read(module: Any) -> None:
    bench = module("serving.vllm_bench")
    found = bench.serve_figures(serve_result(), bench.Work(2, 4, 3))
    assert found == {
        "req_per_s": 1.5,
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
def test_a_leg_of_bench_serve_with_less_work_is_refused(module: Any, changes: Any) -> None:
    bench = module("serving.vllm_bench")
    with pytest.raises(AssertionError, match="completed, failed, output tokens"):
        bench.serve_figures(serve_result(**changes), bench.Work(2, 4, 3))


def test_the_figures_of_bench_throughput_are_read(module: Any) -> None:
    bench = module("serving.vllm_bench")
    result = {"total_num_tokens": 14, "requests_per_second": 2.0, "tokens_per_second": 14.0}
    found = bench.throughput_figures(result, bench.Work(2, 4, 3))
    assert found == {"req_per_s": 2.0, "tok_per_s": 6.0}
    with pytest.raises(AssertionError, match="14 of 16 tokens"):
        bench.throughput_figures(result, bench.Work(2, 4, 4))


def test_the_figures_of_bench_latency_are_read_as_milliseconds(module: Any) -> None:
    result = {"percentiles": {"10": 0.1, "50": 0.25, "99": 0.5}}
    found = module("serving.vllm_bench").latency_figures(result)
    assert found == {"batch_p50_ms": 250.0, "batch_p99_ms": 500.0}


def test_the_client_is_given_a_rate_or_a_concurrency(module: Any) -> None:
    load = module("serving.vllm_bench").Load
    assert load(concurrency=8).options == ["--max-concurrency=8"]
    assert load(rate=0.5).options == ["--request-rate=0.5"]


@pytest.mark.parametrize("between", [1, 2, 3])
def test_every_leg_of_a_case_lies_between_two_legs_of_stock(module: Any, between: int) -> None:
    rounds, order = module("serving.rounds"), []

    def leg(name: str) -> dict[str, float]:
        order.append(name)
        return {"ms": float(len(order))}

    cases = {name: lambda name=name: leg(name) for name in "bcd"}
    found = rounds.alternate(lambda: leg("A"), cases, 2, between=between)
    chain = {1: "AbAcAdAbAcAdA", 2: "AbcAdbAcdA", 3: "AbcdAbcdA"}
    assert "".join(order) == chain[between]
    for key, measured in found.items():
        assert len(measured) == 2
        for one in measured:
            assert one.before["ms"] < one.case["ms"] < one.after["ms"]
            assert order[int(one.case["ms"]) - 1] == key


def test_a_ratio_is_the_case_over_the_mean_of_both_stock_legs(module: Any) -> None:
    rounds = module("serving.rounds")
    measured = [rounds.Round({"ms": 1.0}, {"ms": case}, {"ms": 3.0}) for case in (2.0, 3.0, 4.0)]
    assert rounds.summary(measured) == {
        "rounds": 3,
        "ms": 3.0,
        "ms_stock": 2.0,
        "ms_ratio": 1.5,
        "ms_ratio_p20": 1.2,
        "ms_ratio_p80": 1.8,
    }


def test_requests_carry_as_many_model_names_as_there_are_distinct_steers(module: Any) -> None:
    serving_model = module("serving.model")
    configs = {"guided": {"steers": {}, "presets": {}}}
    model = serving_model.ServedModel(Path("model"), None, configs)
    assert model.models("guided", 3) == ["base:guided0", "base:guided1", "base:guided2"]
    assert model.models("guided", 0) == ["base"]
    assert model.default_config("guided") == {**configs["guided"], "default": "guided0"}


def test_any_token_ids_decode_to_a_text_of_as_many_tokens(module: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    module("serving.model").write_tokenizer(512, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [0, 511, 7, 7, 300]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert len(tokenizer) == 512


def test_engine_arguments_are_spelt_as_flags(module: Any) -> None:
    spelled = module("bench_serving").flags({"dtype": "bfloat16", "a_b": True, "c_d": False})
    assert spelled == ["--dtype=bfloat16", "--a-b", "--no-c-d"]


def test_the_cores_of_a_worker_are_read_from_the_log(module: Any) -> None:
    bound_cores = module("serving.serve_cases").bound_cores
    assert bound_cores("x local_rank=0, core ids=[0, 2, 4]\n local_rank=1, core ids=[6]") == 3
    assert bound_cores("a server on a GPU") is None


def test_an_answer_is_read_from_a_response(module: Any) -> None:
    logprobs = {"tokens": ["token_id:7", "token_id:9"], "token_logprobs": [-1.5, -2.0]}
    answer = module("serving.answers").answer_of({"choices": [{"logprobs": logprobs}]})
    assert (answer.tokens, answer.logprobs) == ((7, 9), (-1.5, -2.0))


def test_a_request_for_an_answer_names_its_steer_by_its_model(module: Any) -> None:
    body = module("serving.answers").completion_body("base:steered0", (5, 6))
    assert (body["model"], body["prompt"]) == ("base:steered0", [5, 6])
    assert (body["temperature"], body["ignore_eos"], body["logprobs"]) == (0, True, 1)
    assert not {"steer", "vllm_xargs"} & set(body)


def test_a_steer_without_effect_on_any_one_prompt_fails_the_check(module: Any) -> None:
    answers = module("serving.answers")
    plain = [answers.Answer((1, 2), (-1.0, -2.0)), answers.Answer((3,), (-1.0,))]
    steered = [answers.Answer((1, 2), (-1.0, -2.5)), answers.Answer((3,), (-1.5,))]
    answers.check_effect(plain, steered, "steered0")
    for without in (plain, [steered[0], plain[1]]):
        with pytest.raises(AssertionError, match=r"steered0, prompt \d: the steer had no"):
            answers.check_effect(plain, without, "steered0")


def test_an_unsteered_answer_that_differs_in_one_logprob_fails_the_check(module: Any) -> None:
    answers = module("serving.answers")
    stock = [answers.Answer((1, 2), (-1.0, -2.0))]
    answers.check_equal(stock, list(stock), "loaded")
    with pytest.raises(AssertionError, match="loaded, prompt 0"):
        answers.check_equal(stock, [answers.Answer((1, 2), (-1.0, -2.0000002))], "loaded")


@pytest.mark.parametrize("check", ["check_equal", "check_effect"])
def test_answers_that_are_missing_or_not_finite_fail_both_checks(module: Any, check: str) -> None:
    answers = module("serving.answers")
    stock = [answers.Answer((1,), (-1.0,))]
    with pytest.raises(AssertionError, match="loaded"):
        getattr(answers, check)(stock, [], "loaded")
    with pytest.raises(AssertionError, match="not finite"):
        getattr(answers, check)(stock, [answers.Answer((1,), (math.nan,))], "loaded")


def test_the_log_of_a_child_that_fails_is_shown(module: Any, tmp_path: Path) -> None:
    processes, log = module("serving.vllm_process"), tmp_path / "log"
    script = "import sys; print('the reason'); sys.exit(3)"
    with pytest.raises(processes.ProcessError, match=r"ended with code 3[^$]*the reason"):
        processes.run(["-c", script], log, plugin=True)


def test_what_a_child_started_ends_with_it(module: Any, tmp_path: Path) -> None:
    processes, log = module("serving.vllm_process"), tmp_path / "log"
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


def test_the_plugin_is_off_in_children_of_stock_vllm(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STEER_DISABLE", "1")
    monkeypatch.setenv("VLLM_STEER_ACTIVE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    environment = module("serving.vllm_process").environment
    assert environment(plugin=False)["VLLM_STEER_DISABLE"] == "1"
    assert "VLLM_STEER_DISABLE" not in environment(plugin=True)
    assert "VLLM_STEER_ACTIVE" not in environment(plugin=True)
    assert environment(plugin=True)["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment(plugin=True)["OMP_WAIT_POLICY"] == "passive"
