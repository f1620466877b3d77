"""A steered engine equals Hugging Face with the paper's formula in float64."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from engines import (
    MIXED,
    RUNNER,
    engine,
    greedy,
    prompts,
    random_steers,
    samples,
    steer_config,
)
from outside import STORIES, needs
from reference import assert_greedy, load_reference, steered_logprobs
from tiny_models import FAMILIES, VOCAB, save_tiny_model

from vllm_steer import LMSteer, embedded, load_steer

pytestmark = pytest.mark.engine

v1_only = pytest.mark.skipif(RUNNER != "v1", reason="runs on the V1 runner only on a CPU")


def assert_mixed_batch(
    model: Path, steers: dict[str, Any], folder: Path, *, vocab_size: int = VOCAB, **options: Any
) -> list[Any]:
    length = options.pop("prompt_length", 12)
    max_tokens = options.pop("max_tokens", 12)
    sampling = options.pop("sampling", {})
    reference = load_reference(model)
    with engine(model, steer_config(steers, folder), **options) as llm:
        outputs = llm.generate(
            prompts(len(MIXED), length=length, vocab_size=vocab_size),
            greedy(MIXED, max_tokens=max_tokens, **sampling),
            use_tqdm=False,
        )
    for output, setting in zip(outputs, MIXED, strict=True):
        active = {name: strength for name, strength in setting.items() if strength}
        assert_greedy(output, reference, active, steers)
    return outputs


QUICK = ("llama", "gpt2", "gemma2-soft-cap-tied")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in QUICK else [pytest.mark.matrix])
        for family in FAMILIES
    ],
)
def test_mixed_batch_on_each_family_with_prompt_logprobs(
    family: str, steers: dict[str, Any], tmp_path: Path
) -> None:
    model = save_tiny_model(family, tmp_path / "model")
    outputs = assert_mixed_batch(
        model, steers, tmp_path / "steers", sampling={"prompt_logprobs": 1}
    )
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) >= 6


@pytest.mark.matrix
def test_the_class_of_a_model_on_the_transformers_backend_is_as_it_was_after_the_engine(
    tmp_path: Path,
) -> None:
    cls = transformers.GPTNeoXModel
    bases, members = cls.__bases__, dict(vars(cls))
    model = save_tiny_model("gpt-neox-transformers-backend", tmp_path / "model")
    with engine(model):
        assert cls.__bases__ != bases
    assert cls.__bases__ == bases
    # Transformers adds answers that it keeps of its class (names with `cached`) to it.
    assert {name: vars(cls)[name] for name in members} == members
    save_tiny_model("gpt-neox-transformers-backend", tmp_path / "again")


@needs(STORIES)
def test_mixed_batch_on_a_pretrained_model(tmp_path: Path) -> None:
    steers = random_steers(64, 512)
    assert_mixed_batch(STORIES, steers, tmp_path, vocab_size=512, max_tokens=24)


def test_mixed_batch_of_fitted_steers_on_the_embedded_model() -> None:
    paths = {path.stem: path for path in embedded.STEERS.glob("*.safetensors")}
    loaded = {name: load_steer(path) for name, path in paths.items()}
    steers = {name: steer for name, steer in loaded.items() if isinstance(steer, LMSteer)}
    config = {"steers": {name: {"path": str(paths[name])} for name in steers}}
    names = sorted(steers)
    settings = [{}, *({name: 4.0} for name in names), {names[0]: -3.0}, {names[0]: 2, names[1]: 2}]
    with engine(embedded.MODEL, config) as llm:
        outputs = llm.generate(
            prompts(len(settings), vocab_size=500), greedy(settings, max_tokens=24), use_tqdm=False
        )
    reference = load_reference(embedded.MODEL)
    assert len(settings) >= 8
    for output, setting in zip(outputs, settings, strict=True):
        assert_greedy(output, reference, setting, steers)


def test_chunked_prefill(llama: Path, steers: dict[str, Any], tmp_path: Path) -> None:
    assert_mixed_batch(
        llama,
        steers,
        tmp_path,
        prompt_length=90,
        max_num_batched_tokens=32,
        max_num_seqs=16,
        sampling={"prompt_logprobs": 1},
    )


def test_forced_preemption(llama: Path, steers: dict[str, Any], tmp_path: Path) -> None:
    with engine(
        llama, steer_config(steers, tmp_path), num_gpu_blocks_override=14, block_size=32
    ) as llm:
        outputs = llm.generate(prompts(len(MIXED)), greedy(MIXED, max_tokens=60), use_tqdm=False)
        preemptions = {m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value
    assert preemptions > 0
    reference = load_reference(llama)
    for output, setting in zip(outputs, MIXED, strict=True):
        assert_greedy(output, reference, {n: s for n, s in setting.items() if s}, steers)


@v1_only
@pytest.mark.matrix
def test_compiled_model(llama: Path, steers: dict[str, Any], tmp_path: Path) -> None:
    assert_mixed_batch(llama, steers, tmp_path, enforce_eager=False)


@samples
def test_several_samples_of_one_request_are_all_steered(
    llama: Path, steers: dict[str, Any], tmp_path: Path
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        n=3,
        temperature=1.0,
        seed=5,
        max_tokens=8,
        logprobs=1,
        detokenize=False,
        ignore_eos=True,
        extra_args={"steer": "plain:3"},
    )
    with engine(llama, steer_config(steers, tmp_path)) as llm:
        (output,) = llm.generate(prompts(1), params, use_tqdm=False)
    reference = load_reference(llama)
    prompt = list(output.prompt_token_ids)

    assert len(output.outputs) == 3
    for completion in output.outputs:
        ids = list(completion.token_ids)
        expected = steered_logprobs(reference, prompt + ids, {"plain": 3.0}, steers)
        for step, token in enumerate(ids):
            actual = completion.logprobs[step][token].logprob
            assert actual == pytest.approx(float(expected[len(prompt) - 1 + step, token]), abs=1e-4)
