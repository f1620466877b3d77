"""``vllm-steer demo``: a vLLM server answers a batch with different steers, or shows its page."""

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from vllm_steer.cli.terminal import Console, say_json
from vllm_steer.demo.batch import PROMPT, DemoResult, ask_all
from vllm_steer.demo.server import EmbeddedServer, serve_embedded_model
from vllm_steer.tables import Column, Table


def demo(
    samples: Annotated[int, typer.Option(min=1, max=64, help="Texts per request.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Serve the playground page until Ctrl-C, nothing else.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the server; a free one if unset.")
    ] = None,
) -> None:
    """Serve the embedded model on loopback and answer one prompt under different steers."""
    console = Console(stderr=as_json)
    if page:
        _keep_page(console, port)
    else:
        _answer_batch(console, port, samples, as_json)


def _keep_page(console: Console, port: int | None) -> None:
    """Serve the page until the process is interrupted, which is its usual end."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _served(console, port, loads_steers=True) as (server, status):
            status.stop()
            if server.changes_key is not None:
                console.print(f"key to load steer files on the page: {server.changes_key}")
            console.print(f"open {server.address}/steer in a browser; Ctrl-C stops the server")
            server.wait()
    except KeyboardInterrupt:
        console.print("stopped the server")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _answer_batch(console: Console, port: int | None, samples: int, as_json: bool) -> None:
    with _served(console, port) as (server, status):
        status.update("one batch of concurrent requests ...")
        started = time.monotonic()
        results = asyncio.run(ask_all(server.api_url, samples=samples))
        seconds = time.monotonic() - started
    console.print(f"{len(results)} requests of {samples} texts in one batch: {seconds:.1f} s")
    if as_json:
        say_json([result.figures for result in results])
    else:
        console.print(_table(results))


@contextmanager
def _served(
    console: Console, port: int | None, *, loads_steers: bool = False
) -> Iterator[tuple[EmbeddedServer, Any]]:
    """The running server and the line on the terminal that says what it does."""
    with console.status("starting vllm serve with --steer-config ...") as status:
        started = time.monotonic()
        with serve_embedded_model(
            on_wait=lambda seconds: status.update(
                console.text(f"waiting for the server ... {seconds:.0f} s")
            ),
            port=port,
            loads_steers=loads_steers,
        ) as server:
            seconds = time.monotonic() - started
            console.print(f"server ready after {seconds:.0f} s at {server.api_url}")
            yield server, status
        status.update("stopped the server")


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
