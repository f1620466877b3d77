"""``vllm-steer demo``: a real server, one batch, a different steer for every request."""

import asyncio
import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def demo(
    samples: Annotated[
        int, typer.Option(min=1, max=64, help="Texts per request that the share is taken over.")
    ] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Serve the embedded model on loopback and answer one prompt under different steers."""
    from vllm_steer.demo.batch import Answer, ask_all
    from vllm_steer.demo.server import serve_embedded_model

    console = Console(stderr=as_json)
    with console.status("starting vllm serve with --steer-config ...") as status:
        started = time.monotonic()
        with serve_embedded_model(
            on_wait=lambda seconds: status.update(f"waiting for the server ... {seconds:.0f} s")
        ) as url:
            console.print(f"server ready after {time.monotonic() - started:.0f} s at {url}")
            status.update("one batch of concurrent requests ...")
            started = time.monotonic()
            answers: list[Answer] = asyncio.run(ask_all(url, samples=samples))
            seconds = time.monotonic() - started
        status.update("stopped the server")
    console.print(f"{len(answers)} requests of {samples} texts in one batch: {seconds:.1f} s")
    if as_json:
        print(json.dumps([answer.figures for answer in answers], indent=2))
    else:
        console.print(_table(answers))


def _table(answers: "list[Answer]") -> Table:  # type: ignore[name-defined]  # noqa: F821
    table = Table(title="One prompt, one batch", show_lines=True)
    for heading in ("request", "strength", "text", "measured"):
        table.add_column(heading, overflow="fold")
    for answer in answers:
        table.add_row(answer.asked_by, answer.strengths, answer.texts[0], answer.measured)
    return table
