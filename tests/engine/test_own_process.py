"""Runs the scenarios of ``own_process.py`` and checks their reports."""

import json
from pathlib import Path

import pytest
from dynamic_settings import SETTINGS as DYNAMIC_SETTINGS
from engines import RUNNER, doses_of, engine, greedy, prompts, steer_config, ties_gemma
from own_process import SETTINGS, STEERS, TOKENS, exact
from scenarios import run_scenario
from tiny_models import GUIDED_FAMILIES, GUIDED_LAYERS, save_tiny_model

pytestmark = pytest.mark.engine

v1_only = pytest.mark.skipif(RUNNER != "v1", reason="runs on the V1 runner only on a CPU")


@v1_only
@pytest.mark.matrix
def test_ngram_speculation_with_several_logits_rows_per_request() -> None:
    assert "accepted drafts" in run_scenario("ngram-speculation")


@v1_only
@pytest.mark.matrix
@pytest.mark.parametrize("scenario", ["tensor-parallel", "pipeline-parallel"])
def test_two_worker_processes(scenario: str) -> None:
    report = run_scenario(scenario, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert f"{len(SETTINGS)} outputs equal" in report


@v1_only
@pytest.mark.matrix
def test_blocks_with_parts_of_a_sum_on_two_worker_processes() -> None:
    report = run_scenario("parallel-blocks", VLLM_CPU_OMP_THREADS_BIND="0|1")
    for name in ("CohereForCausalLM", "GPTJForCausalLM"):
        assert f"{name}: " in report


@v1_only
@pytest.mark.matrix
def test_dynamic_strengths_on_two_worker_processes() -> None:
    report = run_scenario("dynamic-tensor-parallel", VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert f"{len(DYNAMIC_SETTINGS)} outputs equal" in report


@pytest.mark.matrix
def test_the_transformers_backend_of_a_model_that_vllm_implements_natively() -> None:
    assert f"{len(SETTINGS)} outputs equal" in run_scenario("transformers-backend")


@pytest.mark.matrix
def test_new_memory_that_holds_nan_reaches_no_output() -> None:
    report = run_scenario("poisoned-memory")
    assert f"{len(SETTINGS)} outputs equal" in report
    assert "NaN in new memory" in report


@v1_only
@pytest.mark.matrix
def test_only_a_compile_cache_made_with_steers_is_reused(
    tmp_path: Path,
) -> None:
    environments = {
        "VLLM_STEER_TEST_FOLDER": str(tmp_path),
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    loaded = "Directly load AOT compilation"
    assert loaded not in run_scenario("compiled-in-pieces", "unsteered", **environments)
    first = run_scenario("compiled-in-pieces", **environments)
    again = run_scenario("compiled-in-pieces", **environments)
    for report in (first, again):
        assert f"{len(SETTINGS)} outputs equal" in report
    assert "saved AOT compiled function" in first and loaded not in first
    assert loaded in again


@v1_only
@pytest.mark.matrix
def test_hooked_layers_compile_no_more_pieces_than_a_model_without_hooks(tmp_path: Path) -> None:
    """Equal layers are one piece: the name of a site is an input of its graph, not a part of it.

    A hook in the first and the last layer may make these two differ from the others.
    """
    report = run_scenario("pieces-compiled", VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    pieces = json.loads(report.splitlines()[-1])
    assert 0 < pieces["stock"] < pieces["layers"]
    assert pieces["hooked"] == pieces["stock"]


FAMILIES = sorted(set(GUIDED_FAMILIES) - ({"llama", "gemma"} if ties_gemma else {"llama"}))
BACKEND = {name for name in FAMILIES if name.endswith("backend")} | {"olmo2-no-input-norm"}


@v1_only
@pytest.mark.matrix
@pytest.mark.parametrize("part", range(4), ids=lambda part: "+".join(FAMILIES[part::4]))
def test_each_family_compiled_in_pieces_and_loaded_again(part: int, tmp_path: Path) -> None:
    families = FAMILIES[part::4]
    report = run_scenario(
        "compiled-families",
        *families,
        VLLM_CACHE_ROOT=str(tmp_path / "cache"),
        VLLM_LOGGING_LEVEL="INFO",
    )
    for family in families:
        assert f"{family} compiled: " in report and f"{family} loaded: " in report
    # vLLM cannot save what its Transformers backend compiles: those are compiled again.
    saved = [family for family in families if family not in BACKEND]
    assert report.count("saved AOT compiled function") == len(saved)
    assert report.count("Directly load AOT compilation") == len(saved)


def test_unsteered_rows_equal_those_of_an_engine_without_the_plugin_bit_for_bit(
    tmp_path: Path,
) -> None:
    stock = json.loads(run_scenario("stock-logprobs", VLLM_PLUGINS="").splitlines()[-1])
    model = save_tiny_model("llama", tmp_path / "model", num_layers=GUIDED_LAYERS)
    config = steer_config(STEERS, tmp_path / "steers")

    def outputs(llm, settings):
        params = greedy(settings, max_tokens=TOKENS, prompt_logprobs=1)
        return [
            json.loads(json.dumps(exact(output)))
            for output in llm.generate(prompts(len(SETTINGS)), params, use_tqdm=False)
        ]

    with engine(model, config) as llm:
        alone = outputs(llm, [{}] * len(SETTINGS))
        beside_steered = outputs(llm, SETTINGS)
    assert alone == stock
    have_effect = [any(dose.strength for dose in doses_of(setting, STEERS)) for setting in SETTINGS]
    unsteered = [i for i, is_steered in enumerate(have_effect) if not is_steered]
    steered = [i for i, is_steered in enumerate(have_effect) if is_steered]
    assert len(unsteered) >= 4
    assert [beside_steered[i] for i in unsteered] == [stock[i] for i in unsteered]
    assert all(beside_steered[i] != stock[i] for i in steered)
