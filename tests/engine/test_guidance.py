"""Vectors and deltas in a running engine, compared with Hugging Face with hooks in float64."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from engines import (
    GUIDED,
    RUNNER,
    Setting,
    doses_of,
    engine,
    greedy,
    guidance_steers,
    guided_family,
    prompts,
    steer_config,
    unties_gemma,
)
from reference import assert_guided, load_reference
from tiny_models import (
    GUIDED_FAMILIES,
    GUIDED_LAYERS,
    HIDDEN,
    save_tiny_model,
)

from vllm_steer import Steer, SteerError, embedded, load_steer

pytestmark = pytest.mark.engine

v1_only = pytest.mark.skipif(RUNNER != "v1", reason="runs on the V1 runner only on a CPU")


@pytest.fixture(scope="module")
def guided_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"), num_layers=GUIDED_LAYERS)


@pytest.fixture(scope="module")
def all_steers() -> dict[str, Steer]:
    return guided_family("llama")[1]


def assert_guided_batch(
    model: Path,
    steers: dict[str, Steer],
    folder: Path,
    settings: tuple[Setting, ...] = GUIDED,
    *,
    length: int = 12,
    max_tokens: int = 12,
    prompt_logprobs: int | None = 1,
    **options: Any,
) -> list[Any]:
    """Serve one batch of the settings and compare every token and logprob."""
    reference = load_reference(model)
    with engine(model, steer_config(steers, folder), **options) as llm:
        outputs = llm.generate(
            prompts(len(settings), length=length),
            greedy(settings, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
            use_tqdm=False,
        )
    for output, setting in zip(outputs, settings, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)
    return outputs


# One of each way that a block can work; the others are variations of these.
CORE = ("llama", "gpt2", "phi-transformers-backend", "olmo2-no-input-norm")


def marks(family: str) -> list[pytest.MarkDecorator]:
    return [
        *([] if family in CORE else [pytest.mark.matrix]),
        *([unties_gemma] if family == "gemma" else []),
    ]


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=marks(family)) for family in GUIDED_FAMILIES]
)
def test_every_kind_site_mode_schedule_and_phase_on_each_family(
    family: str, tmp_path: Path
) -> None:
    settings, steers = guided_family(family)
    model = save_tiny_model(family, tmp_path / "model", num_layers=GUIDED_LAYERS)
    outputs = assert_guided_batch(model, steers, tmp_path / "steers", settings)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > len(settings) // 2


def test_chunked_prefill(guided_llama: Path, all_steers: dict[str, Steer], tmp_path: Path) -> None:
    assert_guided_batch(
        guided_llama,
        all_steers,
        tmp_path,
        length=90,
        max_num_batched_tokens=64,
        max_num_seqs=32,
    )


def test_forced_preemption(
    guided_llama: Path, all_steers: dict[str, Steer], tmp_path: Path
) -> None:
    options = {"num_gpu_blocks_override": 24, "block_size": 32}
    with engine(guided_llama, steer_config(all_steers, tmp_path), **options) as llm:
        outputs = llm.generate(prompts(len(GUIDED)), greedy(GUIDED, max_tokens=60), use_tqdm=False)
        preemptions = {m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value
    assert preemptions > 0
    reference = load_reference(guided_llama)
    for output, setting in zip(outputs, GUIDED, strict=True):
        assert_guided(output, reference, doses_of(setting, all_steers), all_steers)


@v1_only
def test_compiled_model(guided_llama: Path, all_steers: dict[str, Steer], tmp_path: Path) -> None:
    assert_guided_batch(guided_llama, all_steers, tmp_path, enforce_eager=False)


@pytest.mark.matrix
def test_256_requests_with_256_strengths_in_two_waves(
    guided_llama: Path, all_steers: dict[str, Steer], tmp_path: Path
) -> None:
    """Strengths take no slot: there may be more strengths than steers, also after requests end."""
    steers = {name: all_steers[name] for name in ("push", "turn")}
    waves = [
        [{"push": (i - 128) / 64, "turn": (i + wave) / 32} for i in range(256)] for wave in (0, 1)
    ]
    reference = load_reference(guided_llama)
    with engine(guided_llama, steer_config(steers, tmp_path), max_num_seqs=256) as llm:
        for settings in waves:
            outputs = llm.generate(
                prompts(len(settings)), greedy(settings, max_tokens=4), use_tqdm=False
            )
            for output, setting in list(zip(outputs, settings, strict=True))[::16]:
                assert_guided(output, reference, doses_of(setting, steers), steers)


@pytest.mark.matrix
def test_fitted_guidance_of_the_embedded_model_in_one_batch() -> None:
    steers = {path.stem: load_steer(path) for path in embedded.STEERS.glob("*.safetensors")}
    names = sorted(steers)
    settings: list[Setting] = [{}, *({name: 2.0} for name in names)]
    settings += [{names[i]: 1.0, names[i - 1]: 1.5, names[i - 2]: 2.0} for i in range(len(names))]
    reference = load_reference(embedded.MODEL)
    with engine(embedded.MODEL, str(embedded.STEER_CONFIG)) as llm:
        outputs = llm.generate(
            prompts(len(settings)), greedy(settings, max_tokens=40), use_tqdm=False
        )
    for output, setting in zip(outputs, settings, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.BloomConfig(architectures=["BloomForCausalLM"]),
            "where its sites are has not been tested; steers at the LM head work, and these models",
        ),
        (
            transformers.Olmo2Config(architectures=["Olmo2ForCausalLM"]),
            "no norm before its attention: the site attn_in does not exist in it; resid, attn_out",
        ),
    ],
    ids=["untested", "no-input-norm"],
)
def test_a_model_without_a_known_module_for_a_site_stops_the_start(
    config: Any, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path / "model")
    steer = steer_config({"turn": guided_family("llama")[1]["turn"]}, tmp_path)
    steer["untested"] = "refuse"
    with pytest.raises(SteerError, match=message), engine(tmp_path / "model", steer):
        pass


def test_a_steer_of_more_layers_or_of_other_heads_stops_the_start(
    guided_llama: Path, tmp_path: Path
) -> None:
    deep = {"push": guidance_steers(HIDDEN, GUIDED_LAYERS + 1, HIDDEN)["push"]}
    wide = {"steps": guidance_steers(HIDDEN, GUIDED_LAYERS, 2 * HIDDEN)["steps"]}
    for steers, message in [
        (deep, "push.safetensors: layers are 0-3; the model .* has layers 0-2; choose some with"),
        (wide, "steps.safetensors: width of the heads is 128; the model .* has 64"),
    ]:
        config = steer_config(steers, tmp_path)
        with pytest.raises(SteerError, match=message), engine(guided_llama, config):
            pass
