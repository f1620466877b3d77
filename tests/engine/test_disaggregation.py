"""A prompt's KV from another instance: an engine takes it only if it is steered as asked."""

from pathlib import Path
from typing import Any

import pytest
from engines import engine, guidance_steers, prompts, random_steers, steer_config
from tiny_models import HIDDEN, VOCAB

from vllm_steer.serving.disaggregation import DIGEST

pytestmark = pytest.mark.engine

CONNECTOR = {
    "kv_connector": "HandoverConnector",
    "kv_connector_module_path": "kv_handover",
    "kv_role": "kv_both",
}
STEERS: dict[str, Any] = {
    "none": {},
    "layers": {"push": 1.0},
    "stronger": {"push": 2.0},
    "prompt": {"push": {"strength": 1.0, "phase": "prompt"}},
    "generation": {"push": {"strength": 1.0, "phase": "generation"}},
    "heads": {"steps": 2.0},
    "head": {"plain": 2.0},
}
ALIKE = {("layers", "prompt"), *((a, b) for a in ("none", "generation", "head")
                                 for b in ("none", "generation", "head"))}  # fmt: skip
"""Pairs whose prompts have the same KV."""


def params(steer: Any, kv_transfer_params: Any, max_tokens: int = 1) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        detokenize=False,
        extra_args={"steer": steer, "kv_transfer_params": kv_transfer_params},
    )


def test_a_prompt_from_another_instance_must_be_steered_as_the_request_asks(
    llama: Path, tmp_path: Path
) -> None:
    steers = {**random_steers(HIDDEN, VOCAB), **guidance_steers(HIDDEN, 2, HIDDEN)}
    config = steer_config(steers, tmp_path / "steers")
    (prompt,) = prompts(1)
    with engine(llama, config, kv_transfer_config=CONNECTOR) as llm:
        handed = {}
        for name, steer in STEERS.items():
            asked = params(steer, {"do_remote_decode": True})
            handed[name] = llm.generate(prompt, asked, use_tqdm=False)[0].kv_transfer_params
        unsteered = [name for name in STEERS if DIGEST not in handed[name]]
        assert unsteered == ["none", "generation", "head"]
        for before, received in handed.items():
            for after, steer in STEERS.items():
                asked = params(steer, received, max_tokens=2)
                if before == after or (before, after) in ALIKE or (after, before) in ALIKE:
                    (output,) = llm.generate(prompt, asked, use_tqdm=False)
                    assert len(output.outputs[0].token_ids) == 2
                    continue
                with pytest.raises(ValueError, match=r"the prompt's KV was computed with.*; start"):
                    llm.generate(prompt, asked, use_tqdm=False)
        local = params(STEERS["layers"], {"do_remote_decode": True})
        assert llm.generate(prompt, local, use_tqdm=False)[0].outputs[0].token_ids
