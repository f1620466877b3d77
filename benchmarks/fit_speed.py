"""Steps per second of training an LM-Steer, against autograd through the whole model, in one run.

    python benchmarks/fit_speed.py --json OUT [--models embedded,gpt2] [--rounds N] [--steps N]

Loops over the same batches from the same start, each in a process of its own, round after round:

    head        ``vllm_steer.fit.fit_lm_steer``: hidden states read once, then the head alone
    plain       a loop through the Hugging Face model with a hook in front of its head, backward
                through everything, the model's parameters as Transformers loads them
    frozen      the same with ``requires_grad`` off for the model's parameters

Time runs from the texts to the last step: tokenizing and the pass that computes hidden states are
in it. ``speedup`` is a loop's time over that of ``head`` in the same round: the median of the
rounds, with the 20th and 80th percentile. The loss curves of a model's loops must agree to 1e-3,
else there is no result. ``memory_mib`` is by how much the process's peak resident memory grew over
what it had before the training, the largest of the rounds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import machine
import torch
from decode import quantile
from rich.console import Console
from rich.progress import track
from table import rich_table

LOOPS = ("head", "plain", "frozen")
TOLERANCE = 1e-3
SEED = 2_000_003
TEXTS = {"embedded": 2000, "gpt2": 32, "tiny": 64}
STEPS = {"embedded": 100, "gpt2": 16, "tiny": 6}
BATCH = {"embedded": 32, "gpt2": 8, "tiny": 8}
EPSILON = {"embedded": 0.01, "gpt2": 0.01, "tiny": 0.01}


def main() -> None:
    """Run every row in its own process, compare the curves, write, print."""
    args = _arguments()
    if args.row:
        print(json.dumps(measure(args.row[0], args.row[1], args)))
        return
    result = machine.describe_run("fit_speed")
    result.update(dtype="float32", threads=torch.get_num_threads(), rank=args.rank)
    turns = [(model, loop) for model in args.models for _ in range(args.rounds) for loop in LOOPS]
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for model, loop in track(turns, "fitting", console=Console(stderr=True)):
        measured.setdefault((model, loop), []).append(_row_of_its_own(model, loop, args))
    result["rows"] = [
        summed_up(rounds, measured[model, "head"]) for (model, _), rounds in measured.items()
    ]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print(rich_table(result))


def summed_up(rounds: list[dict[str, Any]], head: list[dict[str, Any]]) -> dict[str, Any]:
    """One loop's rounds beside those of ``head``: medians, and how far the curves are apart.

    Exits if a curve differs by more than ``TOLERANCE`` at any step.
    """
    row, beside = dict(rounds[0]), head[0]
    apart = [abs(a - b) for a, b in zip(row.pop("losses"), beside["losses"], strict=True)]
    if not all(difference <= TOLERANCE for difference in apart):  # nor is NaN
        sys.exit(f"{row['model']}, {row['loop']}: losses differ by up to {max(apart)}")
    low, seconds, high = _spread([one["seconds"] for one in rounds])
    slower = [one["seconds"] / two["seconds"] for one, two in zip(rounds, head, strict=True)]
    speedup_low, speedup, speedup_high = _spread(slower)
    return {
        **row,
        "rounds": len(rounds),
        "seconds": seconds,
        "seconds_p20": low,
        "seconds_p80": high,
        "steps_per_s": row["steps"] / seconds,
        "speedup": speedup,
        "speedup_p20": speedup_low,
        "speedup_p80": speedup_high,
        "memory_mib": max(one["memory_mib"] for one in rounds),
        "loss_difference": max(apart),
    }


def _spread(values: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    low, middle, high = (quantile(sorted(values), share) for share in (0.2, 0.5, 0.8))
    return low, middle, high


def measure(name: str, loop: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    model, tokenizer = load(name)
    texts, labels = write_texts(TEXTS[name])
    steps = args.steps or STEPS[name]
    settings = {
        "rank": args.rank,
        "epsilon": EPSILON[name],
        "steps": steps,
        "batch_size": BATCH[name],
        "max_length": 256,
    }
    train = {"head": _head, "plain": _plain, "frozen": _frozen}[loop]
    train(model, tokenizer, texts[:2], [1.0, -1.0], {**settings, "steps": 1})  # warm up
    _forget_peak()
    before, start = _memory_mib("VmRSS"), perf_counter()
    losses = train(model, tokenizer, texts, labels, settings)
    seconds = perf_counter() - start
    return {
        "model": name,
        "loop": loop,
        **settings,
        "texts": len(texts),
        "seconds": seconds,
        "memory_mib": _memory_mib("VmHWM") - before,
        "final_loss": losses[-1],
        "losses": losses,
    }


def load(name: str) -> tuple[Any, Any]:
    """The embedded model, or one of GPT-2's shape with random weights; parameters as loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from vllm_steer.embedded import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if name == "embedded":
        return AutoModelForCausalLM.from_pretrained(MODEL), tokenizer
    torch.manual_seed(0)
    small = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 2048}
    config = GPT2Config(**(small if name == "tiny" else {}))
    return GPT2LMHeadModel(config).eval(), tokenizer


def write_texts(count: int) -> tuple[list[str], list[float]]:
    """Reviews of the embedded model's corpus and their sentiment."""
    from vllm_steer.embedded import corpus

    samples = corpus.generate(count, seed=SEED)
    labels = [1.0 if sample.sentiment == "positive" else -1.0 for sample in samples]
    return [sample.text for sample in samples], labels


def _head(
    model: Any, tokenizer: Any, texts: list[str], labels: list[float], settings: dict[str, Any]
) -> list[float]:
    from vllm_steer.fit import fit_lm_steer
    from vllm_steer.fit.lm_steer_settings import Watch

    losses: list[float] = []
    watch = Watch(on_step=lambda _, loss: losses.append(loss))
    fit_lm_steer(model, tokenizer, texts, labels, **settings, watch=watch)
    return losses


def _frozen(model: Any, *given: Any) -> list[float]:
    return _plain(model.requires_grad_(False), *given)


def _plain(
    model: Any, tokenizer: Any, texts: list[str], labels: list[float], settings: dict[str, Any]
) -> list[float]:
    """The objective as one would write it: a hook, the model's own loss, ``backward``."""
    from vllm_steer.fit.encoded_texts import draw_batches, encode_texts
    from vllm_steer.fit.objective import initial_parameters

    encoded = encode_texts(tokenizer, texts, max_length=settings["max_length"])
    batches = draw_batches(
        encoded,
        batch_size=settings["batch_size"],
        steps=settings["steps"],
        mask_padding=True,
        seed=0,
    )
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    start = initial_parameters(
        "multiply",
        columns=2,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        rank=settings["rank"],
        initial_scale=1e-2,
        seed=0,
    )
    first, second = (value.requires_grad_() for value in start.values())
    optimizer = torch.optim.Adam([first, second], lr=1e-2)
    strengths = torch.zeros(0)

    def steer(_module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (h,) = inputs
        inner = torch.einsum("btd,sdr->btsr", h, first) * strengths[:, None, :, None]
        return (h + settings["epsilon"] * torch.einsum("btsr,sdr->btd", inner, second),)

    losses = []
    hook = model.get_output_embeddings().register_forward_pre_hook(steer)
    for batch in batches:
        rows = [encoded.rows[row].long() for row in batch.rows]
        tokens, targets = (
            torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=value) for value in (0, -100)
        )
        strengths = torch.tensor([[labels[row], 1.0] for row in batch.rows])
        loss = model(input_ids=tokens, labels=targets, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    hook.remove()
    model.zero_grad()
    return losses


def _row_of_its_own(model: str, loop: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--row", model, loop, "--rank", str(args.rank)]
    command += ["--steps", str(args.steps)] if args.steps else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _forget_peak() -> None:
    """Let the peak begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _memory_mib(name: str) -> float:
    """What the kernel says of this process: VmRSS, resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found) / 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--json", type=Path, metavar="OUT", help="result file")
    target.add_argument("--row", nargs=2, metavar=("MODEL", "LOOP"), help="one row, printed")
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        default=["embedded", "gpt2"],
        metavar="NAME,...",
        help=f"some of {', '.join(TEXTS)}",
    )
    parser.add_argument("--rank", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of every row; by the model without it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
