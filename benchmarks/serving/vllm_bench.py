"""`vllm bench serve`: its command line, and the figures in its result file.

The client takes one body for all requests, but also ``--lora-modules`` with
``--lora-assignment round-robin``: names that the requests use round-robin as their model. A preset
is a model name (``BASE:preset``), so the unmodified client steers every request differently; an
unsteered run passes the single name ``BASE`` in the same way, so that both run the same client
code.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.processes import VLLM, run

Figures = dict[str, float]
FIGURES = {
    "tok_per_s": "output_throughput",
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "p50_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
}


@dataclass(frozen=True)
class RequestLoad:
    """The load of one leg: number of requests, prompt tokens and output tokens."""

    requests: int
    input_len: int
    output_len: int
    concurrency: int


def serve(
    url: str, tokenizer: Path, models: Sequence[str], work: RequestLoad, folder: Path
) -> Figures:
    """Run one leg; requests use the ``models`` round-robin."""
    out = folder / "serve.json"
    out.unlink(missing_ok=True)
    options = [
        *("--backend=openai", f"--base-url={url}", "--endpoint=/v1/completions"),
        *(f"--model={models[0]}", f"--tokenizer={tokenizer}"),
        *("--lora-assignment=round-robin", "--lora-modules", *models),
        *("--dataset-name=random", f"--random-input-len={work.input_len}"),
        *(f"--random-output-len={work.output_len}", f"--num-prompts={work.requests}"),
        *("--temperature=0", "--seed=0", "--disable-tqdm"),
        f"--max-concurrency={work.concurrency}",
        f"--num-warmups={work.concurrency}",  # with the first model
        *("--percentile-metrics=ttft,tpot", "--metric-percentiles=50,99"),
        *("--save-result", f"--result-dir={folder}", f"--result-filename={out.name}"),
    ]
    # The client is the same for every server; the plugin's entry point would load in it too.
    run([*VLLM, "bench", "serve", *options], out.with_suffix(".log"), plugin=False)
    return figures(json.loads(out.read_text()), work)


def figures(result: dict[str, Any], work: RequestLoad) -> Figures:
    """The figures of a result file; checks first that every request got its full answer."""
    actual = (result["completed"], result["failed"], result["total_output_tokens"])
    expected = (work.requests, 0, work.requests * work.output_len)
    assert actual == expected, f"completed, failed, output tokens: {actual}; wanted: {expected}"
    return {figure: result[key] for figure, key in FIGURES.items()}
