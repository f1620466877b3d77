"""Errors and warnings at the start of an engine."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_tools import engine_config, speculative

from vllm_steer import SteerError, save_steer
from vllm_steer.compat import options
from vllm_steer.compat.versions import installed_version


@pytest.fixture
def check(make_plan: Any) -> Callable[..., None]:
    from vllm_steer.serving.startup_checks import check_engine

    return lambda **changed: check_engine(engine_config(make_plan({"a": 1.0}), **changed))


def test_an_ordinary_engine_is_accepted(check: Any) -> None:
    check()
    check(speculative_config=speculative())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_config__runner_type": "pooling"}, "pooling models; a steer changes generated"),
        (
            {"parallel_config__prefill_context_parallel_size": 2},
            "prefill context parallelism; set prefill_context_parallel_size to 1",
        ),
        ({"parallel_config__enable_dbo": True}, r"\(DBO\); leave enable_dbo off"),
        (
            {"parallel_config__enable_batch_sharded_sampling": True},
            "batch-sharded sampling; leave enable_batch_sharded_sampling off",
        ),
        (
            {"cache_config__kv_sharing_fast_prefill": True},
            "KV-sharing fast prefill; leave kv_sharing_fast_prefill off",
        ),
        (
            {"model_config__get_hidden_size": lambda: 8},
            r"steer a: /steers/a.safetensors: hidden size is 6; the model org/model has 8",
        ),
    ],
    ids=["pooling", "pcp", "dbo", "sharded-sampling", "fast-prefill", "hidden-size"],
)
def test_an_unsupported_feature_stops_the_start_with_its_reason(
    check: Any, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        check(**changed)


@pytest.mark.skipif(
    not options.enable_adaptive_verification.name.is_in(installed_version()),
    reason="this vLLM has no adaptive verification",
)
def test_adaptive_verification_stops_the_start(check: Any) -> None:
    message = "adaptive verification of draft tokens; leave enable_adaptive_verification off"
    with pytest.raises(SteerError, match=message):
        check(speculative_config=speculative(enable_adaptive_verification=True))


def test_an_offset_of_another_vocabulary_stops_the_start(tmp_path: Path, make_steer: Any) -> None:
    from vllm_steer import SteerConfig
    from vllm_steer.plan import SteerPlan
    from vllm_steer.serving.startup_checks import check_engine

    save_steer(make_steer("offset"), tmp_path / "tilt")
    plan = SteerPlan.of(SteerConfig.load({"steers": {"t": {"path": str(tmp_path / "tilt")}}}))
    check_engine(engine_config(plan))
    with pytest.raises(SteerError, match="tilt: vocabulary size is 11; the model org/model has 12"):
        check_engine(engine_config(plan, model_config__get_vocab_size=lambda: 12))


@pytest.fixture
def warnings_of_ours() -> Iterator[list[str]]:
    """Messages of the plugin's logger; vLLM's loggers do not propagate to pytest's."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_steer")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "version", ["0.25.0", "0.24.9", "0.34.0", "1.0.0", "0.1.dev1+g123", "0.25.1rc1", "dev"]
)
def test_a_vllm_outside_the_range_gives_one_warning(
    check: Any, monkeypatch: pytest.MonkeyPatch, warnings_of_ours: list[str], version: str
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    check()
    assert len(warnings_of_ours) == 1
    assert f"vLLM {version} is outside the range" in warnings_of_ours[0]
    assert "0.25.1 to 0.33" in warnings_of_ours[0]


@pytest.mark.parametrize(
    "version", ["0.25.1", "0.28.0", "0.32.0", "0.32.0+cpu", "0.33.9", "0.31.1"]
)
def test_a_vllm_inside_the_range_gives_no_warning(
    check: Any, monkeypatch: pytest.MonkeyPatch, warnings_of_ours: list[str], version: str
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    check()
    assert warnings_of_ours == []


@pytest.mark.parametrize("additional", [None, {}, {"x": 1}, {"steer": None}, "text"], ids=repr)
def test_an_additional_config_without_a_steer_is_ignored(additional: Any) -> None:
    from vllm_steer.serving.plan_transport import plan_of, resolved_additional_config

    assert resolved_additional_config(additional) is None
    assert plan_of(SimpleNamespace(additional_config=additional)) is None
