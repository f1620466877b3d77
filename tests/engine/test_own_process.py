"""Runs the scenarios of ``own_process.py`` and looks at what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import MIXED, RUNNER, engine, greedy, prompts, random_steers, steer_config
from own_process import exact
from tiny_models import HIDDEN, VOCAB, save_tiny_model

pytestmark = pytest.mark.engine

v1_only = pytest.mark.skipif(RUNNER != "v1", reason="runs on the V1 runner only on a CPU")


def run_scenario(name: str, **environment: str) -> str:
    script = Path(__file__).with_name("own_process.py")
    done = subprocess.run(
        [sys.executable, str(script), name],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@v1_only
def test_ngram_speculation_with_several_logits_rows_per_request() -> None:
    assert "accepted drafts" in run_scenario("ngram-speculation")


@v1_only
@pytest.mark.matrix
@pytest.mark.parametrize("scenario", ["tensor-parallel", "pipeline-parallel"])
def test_two_worker_processes(scenario: str) -> None:
    said = run_scenario(scenario, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert f"{len(MIXED)} outputs equal" in said


def test_unsteered_rows_are_bit_for_bit_those_of_an_engine_without_the_plugin(
    tmp_path: Path,
) -> None:
    stock = json.loads(run_scenario("stock-logprobs", VLLM_PLUGINS="").splitlines()[-1])
    model = save_tiny_model("llama", tmp_path / "model")
    config = steer_config(random_steers(HIDDEN, VOCAB), tmp_path / "steers")

    def outputs(llm, settings):
        params = greedy(settings, max_tokens=16, prompt_logprobs=1)
        return [
            json.loads(json.dumps(exact(output)))
            for output in llm.generate(prompts(len(MIXED)), params, use_tqdm=False)
        ]

    with engine(model, config) as llm:
        alone = outputs(llm, [{}] * len(MIXED))
        beside_steered = outputs(llm, MIXED)
    assert alone == stock
    unsteered = [i for i, setting in enumerate(MIXED) if not any(setting.values())]
    steered = [i for i, setting in enumerate(MIXED) if any(setting.values())]
    assert [beside_steered[i] for i in unsteered] == [stock[i] for i in unsteered]
    assert all(beside_steered[i] != stock[i] for i in steered)
