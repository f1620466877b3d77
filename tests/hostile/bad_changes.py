"""Bad requests to load, unload and use steers; each is bad by the way that it is made.

    python tests/hostile/bad_changes.py --requests 100000 --files 10000 --json OUT.json

sends them to the middleware of a server whose engines are fake. No code of a file may run: an
audit hook counts the events that a steer's file has no use for.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(p) for p in (HERE, HERE.parent, HERE.parent / "unit", HERE.parents[1])]
from formats import FORMATS, variants  # noqa: E402
from kinds import CANARY  # noqa: E402
from steer_files import STEER_FILES  # noqa: E402

from vllm_steer.runtime.registry import FILE  # noqa: E402

LOAD, UNLOAD, COMPLETIONS = "/v1/load_steer", "/v1/unload_steer", "/v1/completions"
LOADED = "kept"
"""The name of a steer that is loaded, and stays."""
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess", "socket.connect")
MOST_FAULTS = 20

Make = Callable[[random.Random, "Good"], Any]


@dataclass(frozen=True)
class Good:
    """What a good request would have: a file, its text in base64, and the allowed folder."""

    path: Path
    data: str


@dataclass(frozen=True)
class Bad:
    """One request; ``name`` says what is bad about it."""

    name: str
    path: str
    body: bytes
    key: bool = True


def text(rng: random.Random) -> str:
    letters = 'az09_-.:/\\ ,{}[]"\0\n\x1b\u202e\u00e9\u4e2d\ud800'
    return "".join(rng.choices(letters, k=rng.choice((1, 3, 12, 80))))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, NaN and large numbers included."""
    choice = rng.randrange(9 if depth < 3 else 6)
    if choice == 0:
        return rng.choice((None, True, False))
    if choice == 1:
        return rng.choice((0, -1, 1, 2**31, 2**63, -(2**70), 10**400))
    if choice == 2:
        return rng.choice((0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")))
    if choice < 6:
        return text(rng)
    if choice < 8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {text(rng): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def no_text(rng: random.Random) -> Any:
    """A value that is no string."""
    while isinstance(found := value(rng), str):
        pass
    return found


def bad_name(rng: random.Random) -> Any:
    """A value that cannot be a steer's name."""
    bad = ("", "none", "a/b", "../x", "a b", "a:1", "x" * 2000, "\u00e9", "a\0", "\ud800", "a\n")
    return rng.choice((rng.choice(bad), no_text(rng), "/" + text(rng)))


def bad_path(rng: random.Random, good: Good) -> Any:
    """A path that is no file of the folder."""
    folder = good.path.parent
    outside = ("/etc/passwd", "/dev/zero", "/proc/self/environ", f"{folder}/../outside", "x", ".")
    inside = (f"{folder}/no", f"{folder}", f"{folder}/link", f"{folder}/{text(rng)}x", "")
    return rng.choice((rng.choice(outside), rng.choice(inside), no_text(rng), "a\0" + text(rng)))


def bad_data(rng: random.Random, good: Good) -> Any:
    """A text that is no file in base64, or base64 of something else."""
    at = rng.randrange(len(good.data))
    cut = good.data[: at // 4 * 4]
    noise = base64.b64encode(rng.randbytes(rng.choice((1, 8, 100, 5000)))).decode()
    broken = good.data[:at] + rng.choice("?*- \n\u00e9") + good.data[at + 1 :]
    return rng.choice((cut, noise, broken, good.data[:-1], "=", "AAAA" * 99, no_text(rng) or 1))


def load_of_bad_name(rng: random.Random, good: Good) -> Any:
    return {"steer_name": bad_name(rng), "steer_path": str(good.path)}


def load_of_bad_path(rng: random.Random, good: Good) -> Any:
    return {"steer_name": "x", "steer_path": bad_path(rng, good)}


def load_of_bad_data(rng: random.Random, good: Good) -> Any:
    return {"steer_name": "x", "steer_data": bad_data(rng, good)}


def load_of_bad_field(rng: random.Random, good: Good) -> Any:
    """A field that no steer has, or one that this steer cannot have."""
    fields = ("layers", "feature", "hook", "path", "kinds", "mode", "site", "schedule")
    field = rng.choice((*fields, text(rng) + "x"))
    wrong = value(rng)
    while wrong is None or wrong == []:
        wrong = value(rng)
    return {"steer_name": "x", "steer_path": str(good.path), field: wrong}


def load_of_bad_flag(rng: random.Random, good: Good) -> Any:
    wrong = value(rng)
    while isinstance(wrong, bool):
        wrong = value(rng)
    return {"steer_name": "x", "steer_path": str(good.path), "load_inplace": wrong}


def load_of_two_or_no_sources(rng: random.Random, good: Good) -> Any:
    both = {"steer_path": str(good.path), "steer_data": good.data}
    return {"steer_name": "x", **rng.choice((both, {}, {"steer_path": None}))}


def load_of_a_loaded_name(rng: random.Random, good: Good) -> Any:
    return {"steer_name": LOADED, "steer_path": str(good.path)}


def unload_of_bad_name(rng: random.Random, good: Good) -> Any:
    return {"steer_name": rng.choice((bad_name(rng), f"no-{rng.randrange(99)}"))}


def unload_of_bad_field(rng: random.Random, good: Good) -> Any:
    return {"steer_name": LOADED, text(rng) + "x": value(rng)}


def steer_that_is_unknown(rng: random.Random, good: Good) -> Any:
    name = "no-" + text(rng)
    return {"prompt": "x", "steer": rng.choice((name, {name: 1}, {name: {"strength": value(rng)}}))}


def steer_of_bad_strength(rng: random.Random, good: Good) -> Any:
    bad = ("x", "1_0", "nan", "inf", [], [1], {"strenght": 1}, True, float("nan"), 10**400, "1e999")
    return {"prompt": "x", "steer": {LOADED: rng.choice(bad)}}


def file_of_bad_data(rng: random.Random, good: Good) -> Any:
    data = bad_data(rng, good)
    data = rng.choice((data, {"steer_data": data}))
    return {"prompt": "x", "steer": "mine", "steer_files": {"mine": data}}


def file_of_bad_name(rng: random.Random, good: Good) -> Any:
    name = bad_name(rng)
    name = name if isinstance(name, str) else "a b"
    return {"prompt": "x", "steer": {name: 1}, "steer_files": {name: good.data}}


def file_without_use(rng: random.Random, good: Good) -> Any:
    steer = rng.choice(({}, {"steer": LOADED}, {"steer": "none"}, {"steer": {}}))
    return {"prompt": "x", **steer, "steer_files": {"mine": good.data}}


def files_of_wrong_type(rng: random.Random, good: Good) -> Any:
    wrong = value(rng)
    while wrong is None or wrong == {}:
        wrong = value(rng)
    return {"prompt": "x", "steer": "mine", "steer_files": wrong}


def file_of_bad_field(rng: random.Random, good: Good) -> Any:
    field = rng.choice(("layers", "feature", "hook", "path", text(rng) + "x"))
    wrong = value(rng)
    while wrong is None or wrong == []:
        wrong = value(rng)
    file = {"steer_data": good.data, field: wrong}
    return {"prompt": "x", "steer": "mine", "steer_files": {"mine": file}}


MAKERS: Mapping[str, Sequence[Make]] = {
    LOAD: (
        load_of_bad_name, load_of_bad_path, load_of_bad_data, load_of_bad_field, load_of_bad_flag,
        load_of_two_or_no_sources, load_of_a_loaded_name,
    ),
    UNLOAD: (unload_of_bad_name, unload_of_bad_field),
    COMPLETIONS: (
        steer_that_is_unknown, steer_of_bad_strength, file_of_bad_data, file_of_bad_name,
        file_without_use, files_of_wrong_type, file_of_bad_field,
    ),
}  # fmt: skip


def bad_requests(count: int, good: Good, seed: int = 0) -> Iterator[Bad]:
    """``count`` requests; of each way to be bad about as many."""
    makers = [(path, make) for path, of_path in MAKERS.items() for make in of_path]
    for number, (path, make) in enumerate(islice(cycle(makers), count)):
        rng = random.Random(f"{seed} {number}")
        body = json.dumps(make(rng, good)).encode("utf-8")
        how = rng.randrange(20) if path != COMPLETIONS else 19
        if how == 0:
            yield Bad("without key", path, body, key=False)
        elif how == 1:
            yield Bad("cut", path, body[: rng.randrange(len(body))])
        elif how == 2:
            yield Bad("in brackets", path, b"[" * rng.choice((1, 500, 9000)) + body)
        else:
            yield Bad(make.__name__, path, body)


def damaged_files(count: int, folder: Path, seed: int = 0) -> Iterator[tuple[str, bytes, Any]]:
    """``count`` files with the keys that go with them: hostile ones, and changed good ones."""
    each = max(1, count // 2 // len(STEER_FILES.makers))
    hostile = ((name, data, {}) for name, data in STEER_FILES.files(seed, each))
    made = list(islice(hostile, count))
    yield from made
    left = count - len(made)
    for index, (name, make) in enumerate(FORMATS.items()):
        whole, facts = make(folder)
        share = left // len(FORMATS) + (index < left % len(FORMATS))
        for change, data in variants(whole, seed, share):
            yield f"{name} {change}", data, facts


class Audit:
    """Counts the events that loading a steer must not cause, while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: Any) -> None:
        if self.is_on and event.startswith(FORBIDDEN):
            self.seen[event] += 1


@dataclass
class Judge:
    """What the answers are, and which are wrong."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def check(self, name: str, answer: Any) -> None:
        """Count an answer that must be a refusal."""
        self.statuses[f"{name} {answer.status}"] += 1
        if not 400 <= answer.status < 500:
            self.faults.append(f"{name}: {answer.status}")
        elif answer.headers["x-steer"] != "none" or not 0 < len(answer.message) <= 2000:
            self.faults.append(f"{name}: {answer.headers} {answer.message[:200]}")
        elif not answer.message.isprintable():
            self.faults.append(f"{name}: {answer.message[:200]!r}")


async def send_requests(server: Any, good: Good, count: int, judge: Judge) -> None:
    from loading_server import KEY

    for bad in bad_requests(count, good):
        try:
            answer = await server.answer(bad.path, bad.body, key=KEY if bad.key else None)
        except Exception as error:
            judge.faults.append(f"{bad.name}: {type(error).__name__} {error} {bad.body[:200]!r}")
        else:
            judge.check(bad.name, answer)
            if answer.status == 200 and bad.path == LOAD:
                await server.answer(UNLOAD, {"steer_name": "x"})


async def send_files(server: Any, folder: Path, count: int, judge: Judge) -> int:
    """Send damaged files, loaded and in requests in turn; how many of them still are steers."""
    steers = 0
    for number, (name, data, facts) in enumerate(damaged_files(count, folder)):
        file = {"steer_data": base64.b64encode(data).decode(), **facts}
        body = {"prompt": "x", "steer": "mine", "steer_files": {"mine": file}}
        try:
            if number % 2:
                answer = await server.answer(LOAD, {"steer_name": "x", **file})
            else:
                answer = await server.answer(COMPLETIONS, body)
        except Exception as error:
            judge.faults.append(f"{name}: {type(error).__name__} {error}")
            continue
        if answer.status != 200:
            judge.check("damaged file", answer)
            continue
        steers += 1  # what was changed are its values, and they are finite
        judge.statuses["damaged file 200"] += 1
        if number % 2:
            await server.answer(UNLOAD, {"steer_name": "x"})
    return steers


def run(requests: int, files: int, folder: Path) -> dict[str, Any]:
    """Send all to a server with fake engines; the counts, and what was wrong."""
    from loading_server import fake_server
    from loading_tools import lm_steer

    from vllm_steer import save_steer

    allowed, outside, made = (folder / name for name in ("files", "outside", "made"))
    allowed.mkdir()
    made.mkdir()
    path = allowed / "good.safetensors"
    save_steer(lm_steer(0), path)
    save_steer(lm_steer(1), outside)
    (allowed / "link").symlink_to(outside)
    good = Good(path, base64.b64encode(path.read_bytes()).decode())
    server = fake_server(folder, folders=[str(allowed)], upload_mib=64)
    begin, audit, judge = time.monotonic(), Audit(), Judge()
    with asyncio.Runner() as runner:
        kept = {"steer_name": LOADED, "steer_path": str(path)}
        assert runner.run(server.answer(LOAD, kept)).status == 200
        before = server.loading.registry.names().steers
        audit.is_on = True
        runner.run(send_requests(server, good, requests, judge))
        steers = runner.run(send_files(server, made, files, judge))
        audit.is_on = False
        last = runner.run(server.answer(COMPLETIONS, {"prompt": "x", "steer": LOADED}))
    judge.faults += [f"executed: {event} {count}" for event, count in audit.seen.items()]
    judge.faults += [f"created {p}" for p in (Path.cwd(), folder, made) if (p / CANARY).exists()]
    left = sorted(p.name for p in (folder / "loaded").iterdir() if p.name not in (FILE, "lock"))
    if left:
        judge.faults.append(f"left in the folder: {left[:5]}")
    if server.loading.registry.names().steers != before or last.status != 200:
        judge.faults.append(f"what is loaded has changed: {last.status}")
    return {
        "bad_requests": requests,
        "damaged_files": files,
        "damaged_files_that_are_steers": steers,
        "seconds": round(time.monotonic() - begin, 1),
        "statuses": dict(sorted(judge.statuses.items())),
        "num_faults": len(judge.faults),
        "faults": judge.faults[:MOST_FAULTS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    from loading_server import KEY

    from benchmarks.result import Result
    from vllm_steer.environment import API_KEY

    os.environ |= {API_KEY: KEY, "VLLM_LOGGING_LEVEL": "ERROR"}
    result = Result("bad-input", given.json)
    with tempfile.TemporaryDirectory() as temporary:
        result.add(run(given.requests, given.files, Path(temporary)))
    print(json.dumps(result.data["rows"][0], indent=1))
    sys.exit(bool(result.data["rows"][0]["num_faults"]))


if __name__ == "__main__":
    main()
