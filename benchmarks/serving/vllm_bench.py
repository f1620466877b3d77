"""vLLM's own benchmarks: their command lines, and the figures in their result files.

`vllm bench serve` takes one body for all requests, but also ``--lora-modules`` with
``--lora-assignment round-robin``: names that the requests carry in turn as their model. A preset
is a model name (``BASE:preset``), so the unmodified client steers every request differently; an
unsteered run gives the one name ``BASE`` in the same way, so that both run the same client code.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.processes import VLLM, run

Figures = dict[str, float]
SERVE_FIGURES = {
    "req_per_s": "request_throughput",
    "tok_per_s": "output_throughput",
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "p50_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
}


@dataclass(frozen=True)
class Work:
    """What one leg does: so many requests of so many prompt and output tokens."""

    requests: int
    input_len: int
    output_len: int


def serve(
    url: str, tokenizer: Path, models: Sequence[str], concurrency: int, work: Work, folder: Path
) -> Figures:
    """One leg of `vllm bench serve`; requests carry the ``models`` in turn."""
    out = folder / "serve.json"
    options = [
        *("--backend=openai", f"--base-url={url}", "--endpoint=/v1/completions"),
        *(f"--model={models[0]}", f"--tokenizer={tokenizer}"),
        *("--lora-assignment=round-robin", "--lora-modules", *models),
        *("--dataset-name=random", f"--random-input-len={work.input_len}"),
        *(f"--random-output-len={work.output_len}", f"--num-prompts={work.requests}"),
        *("--temperature=0", "--seed=0", "--disable-tqdm"),
        f"--max-concurrency={concurrency}",
        f"--num-warmups={concurrency}",  # with the first of the models
        *("--percentile-metrics=ttft,tpot,itl,e2el", "--metric-percentiles=50,99"),
        *("--save-result", f"--result-dir={folder}", f"--result-filename={out.name}"),
    ]
    # The client is the same for every server; the plugin's entry point would load in it too.
    return serve_figures(_run("serve", options, out, plugin=False), work)


def _run(command: str, options: Sequence[str], out: Path, *, plugin: bool) -> dict[str, Any]:
    """The result file that `vllm bench` has written."""
    out.unlink(missing_ok=True)
    run([*VLLM, "bench", command, *options], out.with_suffix(".log"), plugin=plugin)
    return json.loads(out.read_text())


def serve_figures(result: dict[str, Any], work: Work) -> Figures:
    """The figures in a result file, once every request is seen to have had its full answer."""
    found = (result["completed"], result["failed"], result["total_output_tokens"])
    wanted = (work.requests, 0, work.requests * work.output_len)
    assert found == wanted, f"completed, failed, output tokens: {found}; wanted: {wanted}"
    return {figure: result[key] for figure, key in SERVE_FIGURES.items()}


def throughput(engine: Sequence[str], work: Work, folder: Path, *, plugin: bool) -> Figures:
    """One leg of `vllm bench throughput`: an engine of its own, all requests at once."""
    out = folder / "throughput.json"
    options = [
        *("--dataset-name=random", f"--random-input-len={work.input_len}"),
        *(f"--random-output-len={work.output_len}", f"--num-prompts={work.requests}"),
        *(f"--num-warmups={work.requests}", f"--output-json={out}"),
    ]
    found = _run("throughput", [*engine, *options], out, plugin=plugin)
    return throughput_figures(found, work)


def throughput_figures(result: dict[str, Any], work: Work) -> Figures:
    """Requests and output tokens per second: the file itself has tokens with the prompts' only."""
    tokens = work.requests * (work.input_len + work.output_len)
    assert result["total_num_tokens"] == tokens, f"{result['total_num_tokens']} of {tokens} tokens"
    requests = result["requests_per_second"]
    return {"req_per_s": requests, "tok_per_s": requests * work.output_len}


def latency(
    engine: Sequence[str], work: Work, iterations: int, folder: Path, *, plugin: bool
) -> Figures:
    """One leg of `vllm bench latency`: ``iterations`` batches of all requests, one by one."""
    out = folder / "latency.json"
    options = [
        *(f"--batch-size={work.requests}", f"--input-len={work.input_len}"),
        *(f"--output-len={work.output_len}", f"--num-iters={iterations}"),
        *("--num-iters-warmup=2", f"--output-json={out}"),
    ]
    return latency_figures(_run("latency", [*engine, *options], out, plugin=plugin))


def latency_figures(result: dict[str, Any]) -> Figures:
    """The time of one batch from its prompts to its last tokens."""
    percentiles = result["percentiles"]
    return {f"batch_p{p}_ms": 1e3 * percentiles[str(p)] for p in (50, 99)}
