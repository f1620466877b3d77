"""What dynamic strength costs, in one process and run.

    python benchmarks/dynamic_cost.py --json OUT [--models embedded,llama] [--rounds N] ...

Engines of this process serve requests of a fixed number of greedy tokens, and these figures come
out (see ``dynamic/figures.py``), each beside what counting steps and rows predicts
(``dynamic/counting.py``):

    cost      time of a token of dynamic requests over that of unsteered ones, alone and together
    loop      the authors' uncached loop of three passes per token over the engine
    ordinary  what ordinary requests lose to dynamic ones beside them
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)

import machine  # noqa: E402
import torch  # noqa: E402
from dynamic.figures import ORDINARY, STREAMS, Bench, check_steered, cost, loop, ordinary  # noqa: E402
from dynamic.legs import PROMPT_TOKENS, Prompts  # noqa: E402
from dynamic.models import NAMES, Served, write_served  # noqa: E402
from rich.console import Console  # noqa: E402
from table import rich_table  # noqa: E402

ROUNDS = {"embedded": 15, "llama": 5, "tiny": 2}  # legs of a fast model are short, and noisier
LOOP_REQUESTS = {"embedded": 16, "llama": 1, "tiny": 2}  # of 16; the loop's pace is that of one


def main() -> None:
    """Parse, measure, write, print."""
    args = _arguments()
    console = Console(stderr=True)
    result = machine.describe_run("dynamic_cost")
    result.update(
        dtype="float32",
        threads=None,
        prompt_tokens=PROMPT_TOKENS,
        tokens=args.tokens,
        rows=[],
    )
    with tempfile.TemporaryDirectory(prefix="dynamic-cost-") as folder:
        for name in args.models:
            console.print(name)
            served = write_served(name, Path(folder) / name, steps=args.tokens)
            for line in measure(name, served, args):
                result["rows"].append(line)
                spread = f"{line['ratio_p20']:.2f} to {line['ratio_p80']:.2f}"
                console.print(line["what"], line["requests"], f"{line['ratio']:.2f} ({spread})")
    result["threads"] = torch.get_num_threads()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print(rich_table(result))


def measure(name: str, served: Served, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines of one model, its texts checked before and after."""
    rows = max(STREAMS * args.requests, ORDINARY + STREAMS * max(args.dynamic))
    llm = make_engine(served, rows)
    rounds = args.rounds or ROUNDS[name]
    bench = Bench(name, llm, served, Prompts(served.vocab_size), args.tokens, rounds)
    check_steered(bench)
    for requests in (1, args.requests):
        yield from cost(bench, requests)
    for requests in (1, args.requests):
        yield loop(bench, requests, min(requests, LOOP_REQUESTS[name]))
    for dynamic in args.dynamic:
        yield ordinary(bench, dynamic)
    check_steered(bench)


def make_engine(served: Served, max_num_seqs: int) -> Any:
    """An engine of this process with the steers loaded, otherwise as vLLM sets it up."""
    from vllm import LLM

    on_gpu = {"gpu_memory_utilization": 0.25} if torch.cuda.is_available() else {}
    return LLM(
        str(served.folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=max_num_seqs,
        distributed_executor_backend="uni",
        additional_config={"steer": served.config},
        **on_gpu,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="result file")
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        default=["embedded", "llama"],
        metavar="NAME,...",
        help=f"some of {', '.join(NAMES)}",
    )
    parser.add_argument("--rounds", type=int, help="of each figure; by the model without it")
    parser.add_argument("--tokens", type=int, default=30, help="that each request writes")
    parser.add_argument("--requests", type=int, default=16, help="dynamic requests together")
    parser.add_argument(
        "--dynamic",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 2, 4],
        metavar="N,...",
        help="dynamic requests beside ordinary ones",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
