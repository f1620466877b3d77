"""Three ways to train the same LM-Steer on the same batches, each measured in its own process.

head        ``vllm_steer.fit.fit_lm_steer``: hidden states read once, then the head alone
plain       a loop through the Hugging Face model with a hook in front of its head, backward
            through everything, the model's parameters as Transformers loads them
frozen      the same with ``requires_grad`` off for the model's parameters
"""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch

LOOPS = ("head", "plain", "frozen")
MODELS = {  # texts, steps, batch
    "embedded": (2000, 100, 32),
    "gpt2": (32, 16, 8),
    "tiny": (64, 6, 8),
}
SEED = 2_000_003
Losses = list[float]


def train(name: str, loop: str, rank: int) -> dict[str, Any]:
    """Warm up, train, and say what it took."""
    from vllm_steer.embedded import corpus

    count, steps, batch_size = MODELS[name]
    samples = corpus.generate(count, seed=SEED)
    texts = [sample.text for sample in samples]
    labels = [1.0 if sample.sentiment == "positive" else -1.0 for sample in samples]
    settings = {"rank": rank, "epsilon": 0.01, "steps": steps}
    settings |= {"batch_size": batch_size, "max_length": 256}
    model, tokenizer = _load(name)
    if loop == "frozen":
        model.requires_grad_(False)
    run = _head if loop == "head" else _whole_model
    run(model, tokenizer, texts[:2], [1.0, -1.0], {**settings, "steps": 1})
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
    before, start = _memory_mib("VmRSS"), perf_counter()
    losses = run(model, tokenizer, texts, labels, settings)
    return {
        "model": name,
        "loop": loop,
        **settings,
        "texts": count,
        "seconds": perf_counter() - start,
        "memory_mib": _memory_mib("VmHWM") - before,
        "final_loss": losses[-1],
        "losses": losses,
    }


def _load(name: str) -> tuple[Any, Any]:
    """The embedded model, or one of GPT-2's shape with random weights; parameters as loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from vllm_steer.embedded import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if name == "embedded":
        return AutoModelForCausalLM.from_pretrained(MODEL), tokenizer
    torch.manual_seed(0)
    small = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 2048}
    return GPT2LMHeadModel(GPT2Config(**(small if name == "tiny" else {}))).eval(), tokenizer


def _head(
    model: Any, tokenizer: Any, texts: list[str], labels: list[float], settings: dict[str, Any]
) -> Losses:
    from vllm_steer.fit import fit_lm_steer
    from vllm_steer.fit.lm_steer_settings import Watch

    losses: Losses = []
    watch = Watch(on_step=lambda _, loss: losses.append(loss))
    fit_lm_steer(model, tokenizer, texts, labels, **settings, watch=watch)
    return losses


def _whole_model(
    model: Any, tokenizer: Any, texts: list[str], labels: list[float], settings: dict[str, Any]
) -> Losses:
    """The objective as one would write it: a hook, the model's own loss, ``backward``."""
    from vllm_steer.fit.encoded_texts import draw_batches, encode_texts
    from vllm_steer.fit.objective import initial_parameters

    encoded = encode_texts(tokenizer, texts, max_length=settings["max_length"])
    sizes = {"batch_size": settings["batch_size"], "steps": settings["steps"]}
    batches = draw_batches(encoded, **sizes, mask_padding=True, seed=0)
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    sizes = {"columns": 2, "hidden_size": hidden_size, "vocab_size": vocab_size}
    sizes["rank"] = settings["rank"]
    start = initial_parameters("multiply", **sizes, initial_scale=1e-2, seed=0)
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


def _memory_mib(name: str) -> float:
    """What the kernel says of this process: VmRSS, resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found) / 1024
