"""What stops an engine with steers inside its layers, and does not stop one with others."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from engine_tools import HEAD_SIZE, HEADS, HIDDEN, LAYERS, connector, engine_config, speculative
from guidance import delta, head, plan_for, vector

from vllm_steer import SteerError
from vllm_steer.compat import options
from vllm_steer.compat.versions import installed_version
from vllm_steer.serving.startup_checks import check_engine


def config_for(steers: dict[str, Any], untested: str = "warn", **changed: Any) -> Any:
    plan = plan_for(steers).model_copy(update={"untested": untested})
    return engine_config(plan, **changed)


def check(steer: Any, **changed: Any) -> None:
    check_engine(config_for({"a": steer}, **changed))


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
    check(steer, speculative_config=speculative())


SEQUENCE_PARALLEL = [
    (option.field, f"{option.section.replace('.', '__')}__{option.field}", of)
    for option, of in ((options.enable_sp, ""), (options.enable_hc_sp, " of hyper-connections"))
    if option.name.is_in(installed_version())
]
"""Each vLLM version has one of the two."""

FEATURES: list[tuple[dict[str, Any], str]] = [
    *(
        (
            {path: True},
            f"sequence parallelism{of}: its ranks hold different tokens; leave {name} off",
        )
        for name, path, of in SEQUENCE_PARALLEL
    ),
    *(
        (
            {"kv_transfer_config": connector(*names)},
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
    ("changed", "message"),
    FEATURES,
    ids=[
        *(name for name, *_ in SEQUENCE_PARALLEL),
        "lmcache",
        "lmcache-mp",
        "flexkv",
        "hf3fs",
        "example",
        "inside-multi",
    ],
)
def test_a_feature_incompatible_with_steers_inside_the_layers_stops_only_these(
    changed: dict[str, Any], message: str
) -> None:
    check(AT_HEAD, **changed)
    for case in INSIDE:
        with pytest.raises(SteerError) as caught:
            check(case.values[0], **changed)
        assert str(caught.value).startswith(f"steering does not work with {message}")
    with pytest.raises(SteerError, match="steering does not work with"):
        check_engine(config_for({"a": AT_HEAD, "b": INSIDE[0].values[0]}, **changed))


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
def test_connectors_that_use_vllms_keys_are_accepted(steer: Any, names: tuple[str, ...]) -> None:
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
        (["BloomForCausalLM"], "BloomForCausalLM cannot .* where its sites are has not been te"),
        ([], "this model cannot be steered inside its layers"),
        (None, "this model cannot be steered inside its layers"),
    ],
    ids=str,
)
@pytest.mark.parametrize("steer", INSIDE)
def test_a_model_whose_sites_are_not_known_is_left_to_the_self_test_or_refused(
    steer: Any, architectures: Any, message: str
) -> None:
    unknown = {"model_config__hf_config": SimpleNamespace(architectures=architectures)}
    check(AT_HEAD, untested="refuse", **unknown)
    check(steer, **unknown)
    with pytest.raises(SteerError, match=message):
        check(steer, untested="refuse", **unknown)


@pytest.mark.parametrize("steer", INSIDE)
def test_a_model_that_is_known_not_to_work_stops_steers_inside_only(steer: Any) -> None:
    known = {"model_config__hf_config": SimpleNamespace(architectures=["DeepseekV4ForCausalLM"])}
    check(AT_HEAD, **known)
    with pytest.raises(SteerError, match=r"DeepseekV4ForCausalLM cannot .* \(hyper-connections\)"):
        check(steer, **known)


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
    config = config_for({"a": AT_HEAD})
    assert options.num_layers(config) == LAYERS
    config.model_config = copy.copy(config.model_config)
    config.model_config.hf_config = SimpleNamespace(num_hidden_layers=99)
    assert options.num_layers(config) == LAYERS
