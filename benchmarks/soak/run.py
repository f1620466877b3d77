"""Send 10,000 mixed requests to a server while steers are loaded and unloaded: ``make soak``.

    python -m benchmarks.soak.run --json OUT.json [--configuration v1] [--requests N]

First each distinct request runs alone; in the load its answer must be the same text.
"""

import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.arguments import parser
from benchmarks.result import Result, console
from benchmarks.serving.processes import HOST, child
from benchmarks.soak import checks, serve
from benchmarks.soak.cases import LEAST_GAP, NAME, PROMPTS, Case, all_cases, body_of, least_gap
from benchmarks.soak.changes import Changes, post
from benchmarks.soak.clients import MODEL, Alone, Clients, make_asks
from benchmarks.soak.contents import KEY, Content, digests_of, make_contents, write_config
from vllm_steer import embedded

CONCURRENCY: Final = 32
START_LIMIT_S: Final = 300.0
RUN_LIMIT_S: Final = 1500.0
REQUEST_LIMIT_S: Final = 120.0
REQUESTS_PER_CHANGE: Final = 12
SAMPLES: Final = 100
MOST_FAULTS: Final = 20
FEW, MOST_PROMPTS = 1000, 3
"""With fewer requests, the most prompts; memory and preemptions are not judged then."""


@dataclass(frozen=True)
class Configuration:
    """A server's options and environment, and the size of a run that fits it."""

    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    requests: int = 10_000
    prompts: int = len(PROMPTS)
    settings: int = 18
    contents: int = 4
    """Of each of five kinds."""
    max_tokens: int = 10
    keeps_connections: bool = True


V2_IN_LOG: Final = "Using V2 Model Runner"
_V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
CONFIGURATIONS: Final = {
    "v1": Configuration(),
    "v2": Configuration(
        (), _V2, prompts=3, contents=2, max_tokens=8, keeps_connections=False
    ),
    "api-servers": Configuration(("--api-server-count=2",), keeps_connections=False),
    "data-parallel": Configuration(("--data-parallel-size=2",), keeps_connections=False),
    "tensor-parallel": Configuration(
        ("--tensor-parallel-size=2", "--distributed-executor-backend=mp")
    ),
}  # fmt: skip
ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_STEER_API_KEY": KEY,
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
}
OPTIONS: Final = (
    f"--served-model-name={MODEL}",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=64",
    "--max-num-seqs=32",
    "--block-size=32",
    "--num-gpu-blocks-override=24",  # two blocks for each of 32 requests would be 64
    "--disable-uvicorn-access-log",
)


def main() -> None:
    """Run one configuration; exit with 1 if anything was wrong."""
    arguments = parser(__doc__)
    arguments.add_argument("--configuration", choices=CONFIGURATIONS, default="v1")
    arguments.add_argument("--requests", type=int, metavar="N", help="by default as many as fit")
    arguments.add_argument("--unsteered", action="store_true", help="for comparison: no steers")
    given = arguments.parse_args()
    configuration = CONFIGURATIONS[given.configuration]
    requests = given.requests or configuration.requests
    if given.unsteered:
        configuration = replace(configuration, settings=1, contents=0)
    settings = {
        "configuration": given.configuration,
        "concurrency": CONCURRENCY,
        "unsteered": given.unsteered,
    }
    result = Result("soak", given.json, **settings)
    os.environ.update({**ENVIRONMENT, **configuration.environment})
    with tempfile.TemporaryDirectory() as temporary:
        row = _serve_and_load(configuration, requests, Path(temporary))
    result.add(row, f"{given.configuration}: {row['outcomes']}")
    for fault in row["faults"]:
        console.print(fault, markup=False, highlight=False, soft_wrap=True)
    sys.exit(0 if row["is_good"] else 1)


def _serve_and_load(configuration: Configuration, requests: int, folder: Path) -> dict[str, Any]:
    contents = make_contents(folder, configuration.contents)
    config = write_config(folder)
    log, port = folder / "serve.log", _free_port()
    options = (*OPTIONS, f"--steer-config={config}", *configuration.options)
    command = [serve.__file__, "serve", str(embedded.MODEL), f"--host={HOST}", f"--port={port}"]
    with child([*command, *options], log, plugin=True) as process:
        url = f"http://{HOST}:{port}"
        run = _Run(configuration, requests, contents, process.pid, url, digests_of(config))
        try:
            row = asyncio.run(asyncio.wait_for(run.all(), RUN_LIMIT_S))
        except BaseException:
            console.print(log.read_text(errors="replace")[-4000:], markup=False, highlight=False)
            raise
    is_v2 = V2_IN_LOG in log.read_text(errors="replace")
    return {"model_runner": "V2" if is_v2 else "V1", **row}


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass
class _Run:
    configuration: Configuration
    requests: int
    contents: Sequence[Content]
    process: int
    url: str
    digests: Mapping[str, str]
    contents_of: dict[str, str] = field(default_factory=dict)
    alone: dict[tuple[int, str, str | None], Alone] = field(default_factory=dict)
    near_ties: int = 0

    async def all(self) -> dict[str, Any]:
        """The whole run, as a row of the result."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
        connector = aiohttp.TCPConnector(
            limit=0, force_close=not self.configuration.keeps_connections
        )
        async with aiohttp.ClientSession(self.url, timeout=timeout, connector=connector) as session:
            begin = time.monotonic()
            await self._wait_until_ready(session)
            ready = time.monotonic()
            cases = all_cases(
                self.configuration.prompts
                if self.requests >= FEW
                else min(3, self.configuration.prompts),
                self.configuration.settings,
                [content.name for content in self.contents],
            )
            await self._ask_alone(session, cases)
            alone = time.monotonic()
            row = await self._load(session, cases)
            loaded = time.monotonic()
        seconds = {"start": ready - begin, "alone": alone - ready, "load": loaded - alone}
        return {**row, "seconds": {name: round(value, 1) for name, value in seconds.items()}}

    async def _wait_until_ready(self, session: aiohttp.ClientSession) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and Path(f"/proc/{self.process}/stat").exists():
            if " Z " in Path(f"/proc/{self.process}/stat").read_text():
                break
            with suppress(aiohttp.ClientError):  # it does not listen yet
                async with session.get("/health") as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.5)
        raise RuntimeError("the server was not ready in time")

    async def _ask_alone(self, session: aiohttp.ClientSession, cases: Sequence[Case]) -> None:
        """Each distinct request alone, with the steer that it needs under one name."""
        digests = dict(self.digests)
        loaded: str | None = None
        for case in cases:
            if case.content is not None and case.content != loaded:
                content = next(one for one in self.contents if one.name == case.content)
                body = {"steer_name": NAME, "steer_path": str(content.path), "load_inplace": True}
                status, answer = await post(session, "load_steer", body)
                assert status == 200, answer
                loaded, digests[NAME] = case.content, answer["digest"][:12]
                self.contents_of[digests[NAME]] = case.content
            body = body_of(case, MODEL, self.configuration.max_tokens)
            async with session.post("/v1/completions", json={**body, "logprobs": 2}) as reply:
                answer = await reply.json()
                assert reply.status == 200, answer
                header = reply.headers["X-Steer"]
            doses = [f"{name}:{strength}@{digests[name]}" for name, strength in case.setting.doses]
            assert header == (",".join(doses) or "none"), (header, doses)
            if least_gap(answer["choices"][0]) < LEAST_GAP:
                self.near_ties += 1
                continue
            self.alone[case.key] = Alone(answer["choices"][0]["text"], header)
        await post(session, "unload_steer", {"steer_name": NAME})

    async def _load(self, session: aiohttp.ClientSession, cases: Sequence[Case]) -> dict[str, Any]:
        changes = Changes(session, self.contents, random.Random(1))
        by_name = {content.name: content for content in self.contents}
        clients = Clients(
            session,
            by_name,
            self.alone,
            self.contents_of,
            changes.history,
            self.configuration.max_tokens,
        )
        known = [case for case in cases if case.key in self.alone]
        asks, memory = make_asks(self.requests, known, seed=0), checks.Memory(self.process)

        def is_over() -> bool:
            return clients.done >= self.requests

        def is_due() -> bool:
            return sum(changes.counts.values()) * REQUESTS_PER_CHANGE <= clients.done

        begin, at_begin = time.monotonic(), await checks.metrics(session)
        await asyncio.gather(
            *(clients.work(asks) for _ in range(CONCURRENCY)),
            changes.run(is_due, is_over),
            self._sample(memory, clients, is_over),
        )
        seconds = time.monotonic() - begin
        return await self._row(session, clients, changes, memory, at_begin, seconds)

    async def _sample(self, memory: checks.Memory, clients: Clients, is_over: Any) -> None:
        """Sample the memory after equal numbers of requests."""
        while not is_over():
            if (
                clients.done * SAMPLES
                >= len(next(iter(memory.samples.values()), ())) * self.requests
            ):
                memory.take()
            await asyncio.sleep(0.05)

    async def _row(
        self,
        session: aiohttp.ClientSession,
        clients: Clients,
        changes: Changes,
        memory: checks.Memory,
        at_begin: Mapping[str, float],
        seconds: float,
    ) -> dict[str, Any]:
        idle = await checks.wait_until_idle(session)
        in_use = await checks.steers_in_use(session)
        room = await checks.fill_room(session, self.contents)
        now, growth = await checks.metrics(session), memory.growth()
        faults = [*clients.faults, *changes.faults]
        preempted = "vllm:num_preemptions_total"
        leaked = {n: v for n, v in {**idle, **in_use}.items() if v}
        is_room_whole = all(
            one["loaded"] == one["places"] and one["then refused"] for one in room.values()
        )
        is_preempted = now[preempted] > at_begin[preempted] or self.requests < FEW
        is_flat = all(one["is_flat"] for one in growth.values()) or self.requests < FEW
        return {
            "requests": self.requests,
            "requests_per_s": round(self.requests / seconds, 1),
            "distinct": len(self.alone),
            "distinct_texts": len({alone.text for alone in self.alone.values()}),
            "left_out_near_ties": self.near_ties,
            "outcomes": dict(sorted(clients.counts.items())),
            "by_source": dict(sorted(clients.by_source.items())),
            "changes": dict(sorted(changes.counts.items())),
            "preemptions": now[preempted] - at_begin[preempted],
            "left_behind": leaked,
            "room": room,
            "memory": growth,
            "num_faults": len(faults),
            "faults": faults[:MOST_FAULTS],
            "is_good": not faults and not leaked and is_room_whole and is_flat and is_preempted,
        }


if __name__ == "__main__":
    main()
