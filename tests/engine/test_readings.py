"""Windows, changes that depend on the token, and gates in a running engine, against float64."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from engines import (
    READING,
    RUNNER,
    conditions,
    doses_of,
    engine,
    greedy,
    guidance_steers,
    prompts,
    random_steers,
    reading_steers,
    steer_config,
)
from reference import assert_guided, load_reference, prompt_verdicts
from scenarios import run_scenario
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB, save_tiny_model

from vllm_steer import Steer

pytestmark = pytest.mark.engine

v1_only = pytest.mark.skipif(RUNNER != "v1", reason="runs on the V1 runner only on a CPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"), num_layers=GUIDED_LAYERS)


@pytest.fixture(scope="module")
def steers() -> dict[str, Steer]:
    return {
        **random_steers(HIDDEN, VOCAB),
        **guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN),
        **reading_steers(HIDDEN, GUIDED_LAYERS),
        **conditions(HIDDEN, GUIDED_LAYERS),
    }


def assert_batch(
    model: Path,
    steers: dict[str, Steer],
    folder: Path,
    *,
    length: int = 12,
    max_tokens: int = 12,
    **options: Any,
) -> Counter[str]:
    """Serve one batch of the settings and compare every token; how often conditions held."""
    reference = load_reference(model)
    requests = [READING[i % len(READING)] for i in range(2 * len(READING))]
    with engine(model, steer_config(steers, folder), **options) as llm:
        outputs = llm.generate(
            prompts(len(requests), length=length),
            greedy(requests, max_tokens=max_tokens),
            use_tqdm=False,
        )
    held: Counter[str] = Counter()
    for output, setting in zip(outputs, requests, strict=True):
        doses = doses_of(setting, steers)
        assert_guided(output, reference, doses, steers)
        if any(dose.gate for dose in doses):
            verdicts = prompt_verdicts(reference, output.prompt_token_ids, doses, steers)
            held.update(f"{name} {verdict}" for name, verdict in verdicts.items())
    return held


def test_every_way_in_one_batch(model: Path, steers: dict[str, Steer], tmp_path: Path) -> None:
    held = assert_batch(model, steers, tmp_path)
    assert len(held) >= 9  # most conditions hold for some prompts and not for others


@pytest.mark.matrix
def test_chunked_prefill(model: Path, steers: dict[str, Steer], tmp_path: Path) -> None:
    assert_batch(
        model, steers, tmp_path, length=90, max_tokens=8, max_num_batched_tokens=64, max_num_seqs=48
    )


def test_forced_preemption_keeps_every_verdict(
    model: Path, steers: dict[str, Steer], tmp_path: Path
) -> None:
    """A prompt that is computed again, or that the cache then has, is steered as before."""
    reference = load_reference(model)
    options = {"num_gpu_blocks_override": 24, "block_size": 32}
    with engine(model, steer_config(steers, tmp_path), **options) as llm:
        outputs = llm.generate(
            prompts(len(READING)), greedy(READING, max_tokens=60), use_tqdm=False
        )
        preemptions = {m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value
    assert preemptions > 0
    for output, setting in zip(outputs, READING, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)


@v1_only
@pytest.mark.matrix
def test_compiled_model(model: Path, steers: dict[str, Steer], tmp_path: Path) -> None:
    assert_batch(model, steers, tmp_path, enforce_eager=False)


def test_a_verdict_is_right_where_the_prompt_is_in_the_prefix_cache(
    model: Path, steers: dict[str, Steer], tmp_path: Path
) -> None:
    """The last token is computed at every hit; a condition on any token takes no hit at all."""
    gated = [
        {
            "push": {"strength": 4.0, "when": name, "layers": "2"},
            "plain": {"strength": 2.0, "when": name},
        }
        for name in ("early", "late", "cast", "dotted", "anywhere", "lowest")
    ]
    settings: list[Any] = [{}, *gated, {"push": {"strength": 2.0, "phase": "answer"}}, {}, *gated]
    reference = load_reference(model)
    prompt = prompts(1, length=100)
    with engine(model, steer_config(steers, tmp_path), block_size=32) as llm:
        outputs = [
            llm.generate(prompt, params, use_tqdm=False)[0]
            for params in greedy(settings, max_tokens=40)
        ]
    reads_all = [
        any(
            steers[name].tokens == "any"  # type: ignore[union-attr]
            for dose in doses_of(setting, steers)
            if dose.gate
            for name in dose.gate.conditions
        )
        for setting in settings
    ]
    assert [output.num_cached_tokens for output in outputs] == [
        0 if number == 0 or reads else 96 for number, reads in enumerate(reads_all)
    ]
    for output, setting in zip(outputs, settings, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)


@pytest.mark.matrix
def test_gated_blocks_are_shared_with_equal_gates_only(
    model: Path, steers: dict[str, Steer], tmp_path: Path
) -> None:
    """A longer prompt that repeats a generated answer is computed as its own request asks."""
    reference = load_reference(model)
    settings = [
        {"push": {"strength": 2.0, "when": "early"}},
        {"push": {"strength": 2.0, "when": "late", "phase": "generation"}},
        {"push": {"strength": 2.0, "phase": {"answer": "0:20"}}},
        {"push": {"strength": 2.0, "phase": "answer"}},
        {},
    ]
    with engine(model, steer_config(steers, tmp_path), block_size=32) as llm:
        for setting in settings:
            first = llm.generate(
                prompts(1, length=100), greedy([setting], max_tokens=64)[0], use_tqdm=False
            )[0]
            longer = [*first.prompt_token_ids, *first.outputs[0].token_ids]
            for other in settings:
                (output,) = llm.generate(
                    {"prompt_token_ids": longer}, greedy([other])[0], use_tqdm=False
                )
                assert_guided(output, reference, doses_of(other, steers), steers)


@pytest.mark.matrix
def test_an_unsteered_request_beside_all_of_them_keeps_every_bit(
    model: Path, steers: dict[str, Steer], tmp_path: Path
) -> None:
    def exact(output: Any) -> Any:
        (completion,) = output.outputs
        steps = zip(completion.token_ids, completion.logprobs, strict=True)
        return [(token, step[token].logprob.hex()) for token, step in steps]

    prompt = prompts(1, length=40)
    with engine(model, steer_config(steers, tmp_path), enable_prefix_caching=False) as llm:
        alone = exact(llm.generate(prompt, greedy([{}])[0], use_tqdm=False)[0])
        after = [READING[-1], *READING[6:20]]
        llm.generate(prompts(len(after)), greedy(after), use_tqdm=False)
        assert exact(llm.generate(prompt, greedy([{}])[0], use_tqdm=False)[0]) == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "conditions do not work with pipeline parallelism",
        ),
    ],
)
def test_an_engine_that_could_not_know_a_verdict_does_not_start(
    model: Path, steers: dict[str, Steer], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    config = steer_config({"early": steers["early"], "push": steers["push"]}, tmp_path)
    with pytest.raises(ValueError, match=message), engine(model, config, **options):
        pass


@v1_only
@pytest.mark.matrix
def test_two_tensor_parallel_ranks() -> None:
    report = run_scenario("readings-on-tensor-ranks", VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert f"{2 * len(READING)} outputs equal" in report


@v1_only
@pytest.mark.matrix
def test_two_pipeline_stages() -> None:
    report = run_scenario("readings-on-pipeline-stages", VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert "outputs equal" in report


@v1_only
@pytest.mark.matrix
def test_speculative_decoding() -> None:
    assert f"{2 * len(READING)} outputs equal" in run_scenario("readings-with-drafts")
