"""Loads, replaces and unloads steers in a folder until it is killed: for each line of its input.

The engines are fake. Everything is imported once; a child process does the loading. Writes the
child's process id, and which signal has ended it.
"""

import asyncio
import os
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

from loading_tools import fake_engines, lm_steer, loading_plan, steer_loading

from vllm_steer import save_steer
from vllm_steer.runtime.refusal import Refused
from vllm_steer.serving.runtime.loading import SteerLoading, SteerSource

MOST = 10_000


def change_forever(loading: SteerLoading, sources: list[SteerSource]) -> None:
    """Of three names, of which the room has two."""
    for number in count():
        name, source = str(number % 3), sources[number % len(sources)]
        with suppress(Refused):  # of three names two have room
            if number % 4 == 3:
                asyncio.run(loading.unload(name))
            else:
                asyncio.run(loading.load(name, source, in_place=True))
        if number > MOST:
            return


def main() -> None:
    state, answers = Path(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    sources = []
    for seed in range(5):
        save_steer(lm_steer(seed), state.parent / "whole")
        sources.append(SteerSource((state.parent / "whole").read_bytes(), {}))
    plan = loading_plan(state=str(state), unprotected=True)
    fake_engines(plan)  # makes the engine's configuration, once for all children
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            change_forever(steer_loading(plan, state, fake_engines(plan)), sources)
            os._exit(0)
        print(pid, file=answers, flush=True)
        signal_number = os.WTERMSIG(os.waitpid(pid, 0)[1])
        print(f"ended by {signal_number}", file=answers, flush=True)


if __name__ == "__main__":
    main()
