"""Scenarios of steers that read the token and of gates, for ``own_process.py``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines import (
    READING,
    Setting,
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
from reference import assert_guided, load_reference
from tiny_models import GUIDED_LAYERS, HIDDEN, VOCAB, save_tiny_model

import vllm_steer
from vllm_steer import Steer

STEERS: dict[str, Steer] = {
    **random_steers(HIDDEN, VOCAB),
    **guidance_steers(HIDDEN, GUIDED_LAYERS, HIDDEN),
    **reading_steers(HIDDEN, GUIDED_LAYERS),
}
CONDITIONS = conditions(HIDDEN, GUIDED_LAYERS)
REPEATED = (*READING, *READING)
PARALLEL = {"distributed_executor_backend": "mp"}


def readings_on_tensor_ranks(folder: Path) -> None:
    """Every rank reads the same hidden states, and comes to the same verdicts."""
    _serve(folder, REPEATED, {**STEERS, **CONDITIONS}, tensor_parallel_size=2, **PARALLEL)


def loaded_readings_on_tensor_ranks(folder: Path) -> None:
    """The same, loaded at run time into an engine without steers."""
    room = {
        **{"vectors": 8, "low_rank_maps": 1, "conditions": 4, "offsets": 1},
        "sites": ["attn_in", "attn_out", "heads", "resid"],
        "modes": ["add", "rotate", "project", "relative", "clamp", "scale"],
    }
    _serve(
        folder,
        REPEATED,
        {**STEERS, **CONDITIONS},
        config={"runtime": {"enabled": True, "room": room}},
        tensor_parallel_size=2,
        **PARALLEL,
    )


def readings_on_pipeline_stages(folder: Path) -> None:
    """Steers that read the token; conditions are refused there."""
    _serve(folder, _without_gates(), STEERS, pipeline_parallel_size=2, **PARALLEL)


def readings_with_drafts(folder: Path) -> None:
    """Several rows and tokens per request, some of them drafts that are accepted."""
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    texts = [{"prompt_token_ids": p["prompt_token_ids"][:4] * 5} for p in prompts(len(REPEATED))]
    _serve(
        folder,
        REPEATED,
        {**STEERS, **CONDITIONS},
        texts=texts,
        max_tokens=48,
        speculative_config=speculative,
    )


def _without_gates() -> Sequence[Setting]:
    def has_gate(value: Any) -> bool:
        return isinstance(value, dict) and "when" in value

    return [setting for setting in REPEATED if not any(map(has_gate, setting.values()))]


def _serve(
    folder: Path,
    settings: Sequence[Setting],
    steers: dict[str, Steer],
    *,
    texts: list[Any] | None = None,
    max_tokens: int = 12,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Serve the settings; with a ``config`` of its own, the steers are loaded after the start."""
    model = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    reference = load_reference(model)
    of_config = steer_config(steers, folder / "steers")
    with engine(model, config or of_config, **options) as llm:
        for name in steers if config else ():
            vllm_steer.load_steer_into(llm, name, of_config["steers"][name]["path"])
        outputs = llm.generate(
            texts or prompts(len(settings)),
            greedy(settings, max_tokens=max_tokens),
            use_tqdm=False,
        )
    for output, setting in zip(outputs, settings, strict=True):
        assert_guided(output, reference, doses_of(setting, steers), steers)
    print(f"{len(outputs)} outputs equal the reference")
