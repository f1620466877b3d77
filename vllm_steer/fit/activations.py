"""What a Hugging Face model holds at a site while it reads texts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.hf import sites


@dataclass(frozen=True)
class Recording:
    """What the last forward pass had at one site, layer by layer."""

    at: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [batch, tokens, width]

    def stacked(self) -> torch.Tensor:
        """``[batch, tokens, layers, width]``, float32 or float64, on the CPU."""
        return torch.stack([sites.widened(self.at[layer]).cpu() for layer in sorted(self.at)], 2)

    def keep(self, layer: int) -> sites.Act:
        """An act that changes nothing and keeps what it sees of a layer."""

        def act(x: torch.Tensor) -> torch.Tensor:
            self.at[layer] = x.detach()
            return x

        return act


@contextmanager
def recorded(model: Any, site: str, layers: Sequence[int]) -> Iterator[Recording]:
    """Within the block, each forward pass of ``model`` leaves its activations in the recording.

    Raises ``SteerError`` for a model, a layer or a site that is not there.
    """
    names, blocks, recording = sites.family(model), sites.layers_of(model), Recording()
    sites.check_layers_exist(tuple(layers), len(blocks))
    with ExitStack() as hooks:
        for layer in layers:
            handle = sites.attach(blocks[layer], names, site, recording.keep(layer))
            hooks.callback(handle.remove)
        yield recording


def all_layers(model: Any) -> tuple[int, ...]:
    """Every decoder layer of a model."""
    return tuple(range(model.config.num_hidden_layers))


@torch.no_grad()
def activations(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    site: str,
    layers: Sequence[int],
    batch_size: int = 16,
    max_length: int = 512,
) -> Iterator[torch.Tensor]:
    """For each text in turn ``[tokens, layers, width]``: its tokens at a site, float32, on the CPU.

    A text's tokens are those that the tokenizer makes of it, at most ``max_length``, less its
    special tokens: a beginning-of-text token is the same whatever follows, and in many models it
    dwarfs all others. Texts are read ``batch_size`` at a time, padded on the right, where causal
    attention never sees the padding; the padding is left out. Layers ascend. A float64 model gives
    float64.

    Raises ``SteerError`` for a text without such tokens, and as ``recorded`` does.
    """
    with recorded(model, site, layers) as recording:
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            rows = [_encode(tokenizer, text, max_length) for text in batch]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            model.base_model(input_ids=tokens.to(model.device), use_cache=False)
            special = torch.tensor(tokenizer.all_special_ids)
            for row, found in zip(rows, recording.stacked(), strict=True):
                yield found[: len(row)][~torch.isin(row, special)]


def _encode(tokenizer: Any, text: str, max_length: int) -> torch.Tensor:
    ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    if not set(ids) - set(tokenizer.all_special_ids):
        raise SteerError(f"text {text[:100]!r} has no token but special ones")
    return torch.tensor(ids)
