"""Train the embedded model and its tokenizer: `python scripts/embedded_model/train_model.py`.

A Llama of about a million parameters (hidden size 128, 4 layers, 4 heads of 32, tied embeddings)
on generated text alone. vLLM's attention on a CPU needs heads of at least 32. Another shape makes a
second model, as the target of a steer transfer.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_steer.embedded import MODEL, corpus

TRAIN_SAMPLES: Final = 80_000
BILINGUAL_SAMPLES: Final = 8_000
HELD_OUT_SAMPLES: Final = 1_000
HELD_OUT_SEED: Final = 1_000_003
BATCH_SIZE: Final = 16
MUON_LEARNING_RATE: Final = 0.02
ADAM_LEARNING_RATE: Final = 5e-3
HEAD_DIM: Final = 32
IGNORED: Final = -100

# The model continues text, so a chat is its messages joined in order.
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """The shape of a model; its heads have width 32."""

    hidden_size: int = 128
    layers: int = 4
    vocab_size: int = 1536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL, help="folder to write")
    parser.add_argument("--minutes", type=float, default=8.5, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=Shape.hidden_size)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--vocab-size", type=int, default=Shape.vocab_size)
    arguments = parser.parse_args()
    shape = Shape(arguments.hidden_size, arguments.layers, arguments.vocab_size)
    train(arguments.out, shape, minutes=arguments.minutes, seed=arguments.seed)


def train(folder: Path, shape: Shape, *, minutes: float, seed: int) -> float:
    """Write model, tokenizer and model card into `folder`; returns the held-out loss (nats)."""
    torch.manual_seed(seed)
    samples = corpus.generate(TRAIN_SAMPLES, seed=seed)
    samples += corpus.bilingual(BILINGUAL_SAMPLES, seed=seed)
    texts = [sample.text for sample in samples]
    tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 20_000)], shape.vocab_size)
    model = LlamaForCausalLM(model_config(tokenizer, shape))
    steps = optimise(model, encode(tokenizer, texts), minutes=minutes, seed=seed)
    held_out = corpus.generate(HELD_OUT_SAMPLES, seed=HELD_OUT_SEED)
    loss = evaluate(model, encode(tokenizer, [sample.text for sample in held_out]))
    save(folder, model, tokenizer, minutes=minutes, steps=steps, loss=loss)
    print(f"held-out loss {loss:.3f} nats per token after {steps} steps, written to {folder}")
    return loss


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that starts every text with `<s>`, like Llama's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden_size // HEAD_DIM,
        num_key_value_heads=shape.hidden_size // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(list(texts))["input_ids"]
    return [[*row, int(tokenizer.eos_token_id)] for row in rows]


def batches(rows: Sequence[list[int]], rng: random.Random) -> Iterator[torch.Tensor]:
    """Infinite padded batches; rows of similar length share a batch, to reduce padding."""
    while True:
        order = sorted(rng.sample(range(len(rows)), BATCH_SIZE * 64), key=lambda i: len(rows[i]))
        starts = list(range(0, len(order), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            yield padded([rows[i] for i in order[start : start + BATCH_SIZE]])


def padded(rows: Sequence[list[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORED
    )


def batch_loss(model: LlamaForCausalLM, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy per token; padding is on the right, so causal attention never sees it."""
    logits = model(input_ids=labels[:, :-1].clamp(min=0), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def optimise(
    model: LlamaForCausalLM, rows: Sequence[list[int]], *, minutes: float, seed: int
) -> int:
    """Train for `minutes`; learning rates have a short warm-up and a cosine decay to zero."""
    optimizers = make_optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    model.train()
    start = time.monotonic()
    with Progress() as progress:
        task = progress.add_task("training", total=1.0)
        for step, labels in enumerate(batches(rows, random.Random(seed))):
            progress_share = (time.monotonic() - start) / (60 * minutes)
            if progress_share >= 1:
                return step
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * learning_rate(progress_share)
            loss = batch_loss(model, labels)
            model.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if step % 20 == 0:
                text = f"step {step}, loss {loss.item():.3f}"
                progress.update(task, completed=progress_share, description=text)
    raise AssertionError("the batches are endless")


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (far fewer steps than AdamW here), AdamW for all other
    parameters.
    """
    matrices: list[torch.nn.Parameter] = []
    adam_parameters: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and ".layers." in name
        (matrices if inside else adam_parameters).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.02),
        torch.optim.AdamW(
            adam_parameters, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
        ),
    ]


def learning_rate(share: float) -> float:
    """The share of the peak learning rate after a share of the time."""
    return min(share / 0.02, 0.5 + 0.5 * math.cos(math.pi * share))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, rows: Sequence[list[int]]) -> float:
    """Mean loss per token over all rows."""
    model.train(False)
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH_SIZE):
        labels = padded(rows[start : start + BATCH_SIZE])
        tokens = int((labels[:, 1:] != IGNORED).sum())
        total, count = total + tokens * batch_loss(model, labels).item(), count + tokens
    return total / count


def save(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    minutes: float,
    steps: int,
    loss: float,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    settings = folder / "tokenizer_config.json"
    # The name that both Transformers 4 and 5 accept.
    portable = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(portable, indent=2) + "\n")
    config = model.config
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        minutes=minutes,
        steps=steps,
        loss=loss,
        samples=TRAIN_SAMPLES,
        bilingual=BILINGUAL_SAMPLES,
        batch=BATCH_SIZE,
        held_out=HELD_OUT_SAMPLES,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


MODEL_CARD: Final = """\
---
license: apache-2.0
language: [en, fr, de, es]
---

# The embedded model of vllm-steer

A Llama of {parameters:,} parameters (hidden size {hidden}, {layers} layers, {heads} heads of 32,
tied embeddings, byte-level BPE) that continues short reviews in English, French, German or
Spanish. It is there so that steers can be shown and tested on any machine; it knows nothing
about the world.

- Text: {samples:,} labelled samples and {bilingual:,} that change language, generated by
  `vllm_steer/embedded/corpus.py` from the project's own grammar. No other text was used.
- Training: {minutes:g} minutes on a CPU ({steps:,} steps of {batch} samples, Muon and AdamW),
  `python scripts/embedded_model/train_model.py`.
- Held-out loss: {loss:.3f} nats per token on {held_out:,} samples of another seed.
- Licence: Apache-2.0, model and text alike.
"""


if __name__ == "__main__":
    main()
