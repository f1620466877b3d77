"""``vllm-steer demo``: a vLLM server answers one batch of requests with different steers."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from vllm_steer.cli.terminal import Console, say_json
from vllm_steer.demo.batch import PROMPT, DemoResult, ask_all
from vllm_steer.demo.server import serve_embedded_model
from vllm_steer.tables import Column, Table


def demo(
    samples: Annotated[int, typer.Option(min=1, max=64, help="Texts per request.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Serve the embedded model on loopback and answer one prompt under different steers."""
    console = Console(stderr=as_json)
    with console.status("starting vllm serve with --steer-config ...") as status:
        started = time.monotonic()
        with serve_embedded_model(
            on_wait=lambda seconds: status.update(
                console.text(f"waiting for the server ... {seconds:.0f} s")
            )
        ) as url:
            console.print(f"server ready after {time.monotonic() - started:.0f} s at {url}")
            status.update("one batch of concurrent requests ...")
            started = time.monotonic()
            results = asyncio.run(ask_all(url, samples=samples))
            seconds = time.monotonic() - started
        status.update("stopped the server")
    console.print(f"{len(results)} requests of {samples} texts in one batch: {seconds:.1f} s")
    if as_json:
        say_json([result.figures for result in results])
    else:
        console.print(_table(results))


def _table(results: Sequence[DemoResult]) -> Table:
    measures = list(results[0].shares)
    texts = [Column("given by"), Column("strength"), Column("first text")]
    rows = [
        (
            result.request.steer_carrier,
            result.request.strengths,
            result.texts[0].removeprefix(PROMPT).strip(),
            *(result.shares[measure] for measure in measures),
        )
        for result in results
    ]
    return Table(
        f"{PROMPT} ...",
        [*texts, *(Column(measure, ".0%") for measure in measures)],
        rows,
        caption="shares of each request's texts, by lexicon",
        text_column=2,
    )
