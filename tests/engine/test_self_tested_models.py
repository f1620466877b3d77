"""Models that are not in the table: the self-test finds their sites, Hugging Face agrees."""

from pathlib import Path

import pytest
import transformers
from engines import (
    GUIDED,
    RUNNER,
    doses_of,
    engine,
    greedy,
    guidance_steers,
    prompts,
    random_steers,
    settings_without,
    steer_config,
    vllm_version,
)
from packaging.version import Version
from reference import assert_guided, load_reference
from self_tested_models import (
    ALTERNATING_UPDATES,
    POST_NORM,
    SCALED_IN_FLOAT16,
    UNTESTED,
    Untested,
    save_untested,
)
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB

from vllm_steer import SteerError

pytestmark = pytest.mark.engine

QUICK = ("Glm4ForCausalLM", "GraniteForCausalLM")
V1_ONLY = {
    **dict.fromkeys(
        ("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM"),
        "vLLM compiles its norm for a CPU, which Triton's interpreter does not allow",
    ),
    **dict.fromkeys(
        ("Glm4MoeForCausalLM", "GptOssForCausalLM"),
        "vLLM's V2 runner makes no expert-parallel group for it on a CPU",
    ),
}
ADDED_LATER = (
    "ExaoneMoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "GraniteSWAForCausalLM",
)


def not_served(name: str) -> str | None:
    """Why an older vLLM has no model of its own for this config, steered or not."""
    from vllm import ModelRegistry

    if name not in ADDED_LATER or vllm_version >= Version("0.32"):
        return None
    if name not in ModelRegistry.get_supported_archs():
        return f"vLLM {vllm_version.base_version} has no model of its own named {name}"
    if name == "GraniteMoeHybridForCausalLM":
        from vllm.model_executor.models.granitemoehybrid import ALL_DECODER_LAYER_TYPES

        kinds = set(transformers.GraniteMoeHybridConfig(**UNTESTED[name].options).layer_types)
        if not kinds <= set(ALL_DECODER_LAYER_TYPES):
            return f"vLLM {vllm_version.base_version} has other names of layer types"
    return None


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.matrix]) for n in UNTESTED],
)
def test_every_kind_site_mode_schedule_and_phase(name: str, tmp_path: Path) -> None:
    if RUNNER == "v2" and name in V1_ONLY:
        pytest.skip(V1_ONLY[name])
    if (reason := not_served(name)) is not None:
        pytest.skip(reason)
    guidance = guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)
    steers = {**random_steers(HIDDEN, VOCAB), **guidance}
    settings = GUIDED
    for site in UNTESTED[name].lacks:
        settings = settings_without(site, settings, steers)
        steers = {key: steer for key, steer in steers.items() if steer.site != site}
    model = save_untested(UNTESTED[name], tmp_path / "model")
    reference = load_reference(model)
    with engine(model, steer_config(steers, tmp_path / "steers")) as llm:
        outputs = llm.generate(
            prompts(len(settings)),
            greedy(settings, max_tokens=12, prompt_logprobs=1),
            use_tqdm=False,
        )
    for output, setting in zip(outputs, settings, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > len(settings) // 2


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model", "dtype", "message"),
    [
        (POST_NORM, "float32", "layer 0: layer 1 normalises its input instead of adding to it"),
        (
            SCALED_IN_FLOAT16,
            "float16",
            "the first layer multiplies what is added to its input by 0",
        ),
        (
            ALTERNATING_UPDATES,
            "float32",
            r"the layer returns \[4, .*, 64\]; expected a tensor of 64 numbers per token first",
        ),
    ],
    ids=["post-norm", "scaled-in-float16", "several-streams"],
)
def test_a_stream_that_a_steer_would_be_wrong_in_stops_the_start(
    model: Untested, dtype: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")  # latent attention has no kernels on a CPU
    folder = save_untested(model, tmp_path / "model")
    push = {"push": guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)["push"]}
    with (
        pytest.raises(SteerError, match=message),
        engine(folder, steer_config(push, tmp_path / "steers"), dtype=dtype),
    ):
        pass


@pytest.mark.matrix
def test_the_config_may_refuse_models_that_only_the_self_test_knows(tmp_path: Path) -> None:
    transformers.BloomConfig(architectures=["BloomForCausalLM"]).save_pretrained(tmp_path / "model")
    push = {"push": guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN)["push"]}
    config = {**steer_config(push, tmp_path / "steers"), "untested": "refuse"}
    with (
        pytest.raises(SteerError, match="BloomForCausalLM cannot be steered inside its layers"),
        engine(tmp_path / "model", config),
    ):
        pass
