"""Steps per second of training an LM-Steer, against autograd through the whole model, in one run.

    python -m benchmarks.fit_speed --json OUT [--models embedded,gpt2] [--rounds N]

The loops of ``fit_loops.py`` go over the same batches from the same start, each in a process of its
own, round after round. Time runs from the texts to the last step: tokenizing and the pass that
computes hidden states are in it. ``speedup`` is a loop's time over that of ``head`` in the same
round. The loss curves of a model's loops must agree to 1e-3, else there is no result.
``memory_mib`` is by how much the process's peak resident memory grew over what it had before the
training, the largest of the rounds.
"""

import sys
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.fit_loops import LOOPS, MODELS, train
from benchmarks.processes import in_own_process
from benchmarks.result import Result
from benchmarks.rounds import spread

TOLERANCE = 1e-3


def main() -> None:
    """Run every loop in its own process, compare the curves, write, print."""
    parser = arguments.parser(__doc__)
    known, default = arguments.some_of(MODELS), ["embedded", "gpt2"]
    parser.add_argument("--models", type=known, default=default, metavar="NAME,...")
    parser.add_argument("--rank", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    settings = {"dtype": "float32", "threads": torch.get_num_threads(), "rank": args.rank}
    result = Result("fit_speed", args.json, **settings)
    for model in args.models:
        rounds = [
            {loop: in_own_process(train, model, loop, args.rank) for loop in LOOPS}
            for _ in range(args.rounds)
        ]
        for loop in LOOPS:
            line = summed_up([one[loop] for one in rounds], [one["head"] for one in rounds])
            result.add(line, f"{model}, {loop}: {line['seconds']:.1f} s")
    result.show()


def summed_up(rounds: list[dict[str, Any]], head: list[dict[str, Any]]) -> dict[str, Any]:
    """One loop's rounds beside those of ``head``: medians, and how far the curves are apart.

    Exits if a curve differs by more than ``TOLERANCE`` at any step.
    """
    line, beside = dict(rounds[0]), head[0]
    apart = [abs(a - b) for a, b in zip(line.pop("losses"), beside["losses"], strict=True)]
    if not all(difference <= TOLERANCE for difference in apart):  # nor is NaN
        sys.exit(f"{line['model']}, {line['loop']}: losses differ by up to {max(apart)}")
    slower = [one["seconds"] / two["seconds"] for one, two in zip(rounds, head, strict=True)]
    line |= spread("seconds", [one["seconds"] for one in rounds])
    return {
        **line,
        "rounds": len(rounds),
        "steps_per_s": line["steps"] / line["seconds"],
        **spread("speedup", slower),
        "memory_mib": max(one["memory_mib"] for one in rounds),
        "loss_difference": max(apart),
    }


if __name__ == "__main__":
    main()
