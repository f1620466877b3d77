"""What stops an engine with steers inside its layers, and does not stop one with others."""

from types import SimpleNamespace
from typing import Any

import pytest
from guidance import delta, head, plan_for, vector

from vllm_steer import SteerError
from vllm_steer.serving.engine_config import check_engine, num_layers

HIDDEN, HEADS, HEAD_SIZE, LAYERS = 6, 4, 2, 3


def fake_config(steers: dict[str, Any], **changed: Any) -> Any:
    """A Llama of 3 layers whose heads are wider than its hidden states."""
    text_config = SimpleNamespace(num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(
            runner_type="generate",
            model="org/model",
            hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
            hf_text_config=text_config,
            get_hidden_size=lambda: HIDDEN,
            get_vocab_size=lambda: 11,
            get_head_size=lambda: HEAD_SIZE,
        ),
        "device_config": SimpleNamespace(device_type="cpu"),
        "parallel_config": SimpleNamespace(use_sequence_parallel_moe=False),
        "cache_config": SimpleNamespace(),
        "compilation_config": SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        "kv_transfer_config": None,
        "speculative_config": None,
    }
    for path, value in changed.items():
        part, _, field = path.partition("__")
        target = parts[part] if "__" not in field else getattr(parts[part], field.split("__")[0])
        if field:
            setattr(target, field.split("__")[-1], value)
        else:
            parts[part] = value
    plan = plan_for(steers).to_json()
    return SimpleNamespace(additional_config={"steer": plan}, **parts)


def check(steer: Any, **changed: Any) -> None:
    check_engine(fake_config({"a": steer}, **changed))


def connector(name: str | None, *inner: str) -> Any:
    children = [{"kv_connector": child, "kv_connector_extra_config": {}} for child in inner]
    return SimpleNamespace(
        kv_connector=name, kv_connector_extra_config={"connectors": children} if inner else {}
    )


INSIDE = [
    pytest.param(vector((0, 2), width=HIDDEN), id="resid"),
    pytest.param(vector((2,), width=HIDDEN, site="attn_in", mode="rotate"), id="attn_in"),
    pytest.param(delta(2, (1,), width=HIDDEN, site="attn_out"), id="attn_out"),
    pytest.param(delta(2, (0, 1, 2), width=HEADS * HEAD_SIZE), id="heads"),
]
AT_HEAD = head(width=HIDDEN)


@pytest.mark.parametrize("steer", [*INSIDE, AT_HEAD])
def test_an_ordinary_engine_is_accepted(steer: Any) -> None:
    check(steer)
    check(steer, kv_transfer_config=connector(None))
    check(steer, speculative_config=SimpleNamespace(method="eagle"))


FEATURES: list[tuple[str, Any, str]] = [
    (
        "parallel_config__use_sequence_parallel_moe",
        True,
        "sequence-parallel mixture of experts: its ranks hold different tokens; turn expert "
        "parallelism or data parallelism off, or steer at the LM head only",
    ),
    (
        "compilation_config__pass_config__enable_sp",
        True,
        "sequence parallelism: its ranks hold different tokens; leave enable_sp off, or steer at",
    ),
    *(
        (
            "kv_transfer_config",
            connector(*names),
            "a KV connector that makes its own keys from tokens: it would mix steered and "
            "unsteered KV; use one that takes vLLM's block hashes, or steer at the LM head only",
        )
        for names in [
            ("LMCacheConnectorV1",),
            ("LMCacheMPConnector",),
            ("FlexKVConnectorV1",),
            ("HF3FSKVConnector",),
            ("ExampleConnector",),
            ("MultiConnector", "NixlConnector", "LMCacheConnectorV1"),
        ]
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    FEATURES,
    ids=["sp-moe", "sp", "lmcache", "lmcache-mp", "flexkv", "hf3fs", "example", "inside-multi"],
)
def test_a_feature_that_steers_inside_cannot_live_with_stops_them_only(
    path: str, value: Any, message: str
) -> None:
    check(AT_HEAD, **{path: value})
    for case in INSIDE:
        with pytest.raises(SteerError) as caught:
            check(case.values[0], **{path: value})
        assert str(caught.value).startswith(f"steering does not work with {message}")
    with pytest.raises(SteerError, match="steering does not work with"):
        check_engine(fake_config({"a": AT_HEAD, "b": INSIDE[0].values[0]}, **{path: value}))


@pytest.mark.parametrize(
    "names",
    [
        ("NixlConnector",),
        ("OffloadingConnector",),
        ("MooncakeStoreConnector",),
        ("SimpleCPUOffloadConnector",),
        ("MultiConnector", "NixlConnector", "OffloadingConnector"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("steer", INSIDE)
def test_connectors_that_take_vllms_keys_are_accepted(steer: Any, names: tuple[str, ...]) -> None:
    check(steer, kv_transfer_config=connector(*names))


def test_every_connector_of_vllm_that_hashes_tokens_is_known() -> None:
    """A connector that is new in vLLM has to be read before it is trusted."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    takes_block_hashes_or_moves_one_request = {
        "DecodeBenchConnector", "ExampleHiddenStatesConnector", "HiSparseConnector",
        "MoRIIOConnector", "MooncakeConnector", "MooncakeStoreConnector", "MultiConnector",
        "NixlConnector", "NixlPullConnector", "NixlPushConnector", "OffloadingConnector",
        "SimpleCPUOffloadConnector",
    }  # fmt: skip
    for name in sorted(set(KVConnectorFactory._registry) - takes_block_hashes_or_moves_one_request):
        with pytest.raises(SteerError, match="makes its own keys from tokens"):
            check(INSIDE[0].values[0], kv_transfer_config=connector(name))


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["FalconForCausalLM"], "FalconForCausalLM cannot .* where its sites are has not been te"),
        (
            ["DeepseekV3ForCausalLM"],
            "DeepseekV3ForCausalLM cannot .* its stream is scaled by a fac",
        ),
        ([], "this model cannot be steered inside its layers"),
        (None, "this model cannot be steered inside its layers"),
    ],
    ids=str,
)
@pytest.mark.parametrize("steer", INSIDE)
def test_a_model_whose_sites_are_not_known_stops_steers_inside_only(
    steer: Any, architectures: Any, message: str
) -> None:
    unknown = {"model_config__hf_config": SimpleNamespace(architectures=architectures)}
    check(AT_HEAD, **unknown)
    with pytest.raises(SteerError, match=message):
        check(steer, **unknown)


def test_a_model_without_a_norm_before_its_attention_has_the_other_sites() -> None:
    olmo = {"model_config__hf_config": SimpleNamespace(architectures=["Olmo2ForCausalLM"])}
    with pytest.raises(
        SteerError, match="org/model has no norm before its attention: the site attn_in does not"
    ):
        check(INSIDE[1].values[0], **olmo)
    for index in (0, 2, 3):
        check(INSIDE[index].values[0], **olmo)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (vector((0,), width=5), "hidden size is 5; the model org/model has 6"),
        (vector((0,), width=8), "hidden size is 8; the model org/model has 6"),
        (delta(1, (0,), width=8, site="resid"), "hidden size is 8; the model org/model has 6"),
        (delta(1, (0,), width=6), "width of the heads is 6; the model org/model has 8"),
        (vector((0, 3), width=6), "layers are 0,3; the model org/model has layers 0-2; choose"),
        (vector((1, 2, 3, 9), width=6), "layers are 1-3,9; the model org/model has layers 0-2"),
        (delta(1, (3,), width=8), "layers are 3; the model org/model has layers 0-2; choose"),
        (head(width=5), "hidden size is 5; the model org/model has 6"),
    ],
    ids=["narrow", "wide", "delta", "heads", "layers", "more-layers", "delta-layers", "head"],
)
def test_a_steer_of_another_size_stops_the_start(steer: Any, message: str) -> None:
    with pytest.raises(SteerError) as caught:
        check(steer)
    assert str(caught.value).startswith(f"steer a: /steers/a.safetensors: {message}")


def test_the_sizes_are_those_of_the_language_model() -> None:
    """A multimodal model's own configuration holds that of its text model."""
    config = fake_config({"a": AT_HEAD}).model_config
    assert num_layers(config) == LAYERS
    config.hf_config.num_hidden_layers = 99
    assert num_layers(config) == LAYERS
