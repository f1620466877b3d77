"""The Triton kernels in a running engine, compared with Hugging Face and the papers' formulas.

Without a GPU they run in the interpreter, which the second model runner enables anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_outputs import assert_dynamic
from dynamic_settings import SETTINGS as DYNAMIC
from engines import (
    GUIDED,
    MIXED,
    RUNNER,
    doses_of,
    engine,
    greedy,
    guided_family,
    prompts,
    random_steers,
    reporting,
    steer_config,
)
from reference import assert_greedy, assert_guided, load_reference
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB, save_tiny_model

from vllm_steer import LMSteer, Steer, SteerError

pytestmark = pytest.mark.engine

has_triton = pytest.mark.skipif(
    RUNNER != "v2" and not torch.cuda.is_available(),
    reason="on a CPU the interpreter is on under the V2 runner only",
)


@contextmanager
def called_on(owner: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The first argument of each call of a module's function, or of a class's method."""
    calls: list[Any] = []
    original = getattr(owner, function)

    def calling(first: Any, *args: Any) -> Any:
        calls.append(first)
        return original(first, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, calling)
        yield calls


def triton_config(steers: dict[str, Any], folder: Path) -> dict[str, Any]:
    return steer_config(steers, folder) | {"kernels": "triton"}


@has_triton
@pytest.mark.parametrize(
    ("backend", "max_num_seqs"),
    [("TILED", 16), pytest.param("ROWWISE", 4, marks=pytest.mark.matrix)],
)
def test_lm_steer_kernels_serve_a_mixed_batch(
    backend: str,
    max_num_seqs: int,
    llama: Path,
    steers: dict[str, LMSteer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_steer.kernels.lm_steer import triton_backend, triton_rowwise, triton_tiled

    expected = {"TILED": triton_tiled.TILED, "ROWWISE": triton_rowwise.ROWWISE}[backend]
    reference = load_reference(llama)
    with (
        called_on(triton_backend.TritonBackend, "steer_rows", monkeypatch) as calls,
        engine(llama, triton_config(steers, tmp_path), max_num_seqs=max_num_seqs) as llm,
    ):
        calls.clear()
        outputs = llm.generate(
            prompts(len(MIXED)),
            greedy(MIXED, max_tokens=6, prompt_logprobs=1),
            use_tqdm=False,
        )
    assert len(calls) >= 6
    assert all(called is expected for called in calls)
    for output, setting in zip(outputs, MIXED, strict=True):
        assert_greedy(output, reference, {n: s for n, s in setting.items() if s}, steers)


@has_triton
def test_guidance_kernels_serve_every_kind_site_mode_schedule_and_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_steer.kernels.guidance import triton_fused

    model = save_tiny_model("llama", tmp_path / "model", num_layers=GUIDED_LAYERS)
    steers: dict[str, Steer] = guided_family("llama")[1]
    reference = load_reference(model)
    with (
        called_on(triton_fused, "steer_tokens_", monkeypatch) as calls,
        engine(model, triton_config(steers, tmp_path / "steers")) as llm,
    ):
        calls.clear()
        outputs = llm.generate(
            prompts(len(GUIDED)),
            greedy(GUIDED, max_tokens=6, prompt_logprobs=1),
            use_tqdm=False,
        )
    assert len(calls) >= 6 * GUIDED_LAYERS
    for output, setting in zip(outputs, GUIDED, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)


@has_triton
def test_the_divergence_kernels_give_the_strengths_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the layers and at the head, both forms of the KL, with fixed doses."""
    from vllm_steer.kernels.divergence import triton_fused

    model = save_tiny_model("llama", tmp_path / "model", num_layers=GUIDED_LAYERS)
    steers = {**random_steers(HIDDEN, VOCAB), **guided_family("llama")[1]}
    settings = [DYNAMIC[index] for index in (0, 5, 9, 11, 14, 16, 18)]
    reference = load_reference(model)
    with (
        called_on(triton_fused, "divergence", monkeypatch) as calls,
        engine(model, triton_config(steers, tmp_path / "steers"), max_num_seqs=32) as llm,
    ):
        calls.clear()
        params = reporting(greedy(settings, max_tokens=4))
        outputs = llm.generate(prompts(len(settings)), params, use_tqdm=False)
    assert len(calls) >= 4
    for output, setting in zip(outputs, settings, strict=True):
        assert_dynamic(output, reference, doses_of(setting, steers), steers)


@pytest.mark.skipif(
    RUNNER == "v2" or torch.cuda.is_available(), reason="Triton kernels can be had here"
)
def test_triton_on_a_device_that_cannot_run_it_stops_the_start(
    llama: Path, steers: dict[str, LMSteer], tmp_path: Path
) -> None:
    with (
        pytest.raises(SteerError, match=r"kernels is triton, and the device is cpu.*auto or torch"),
        engine(llama, triton_config(steers, tmp_path)),
    ):
        pass
