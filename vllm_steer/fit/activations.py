"""Records a Hugging Face model's activations at a site."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_steer.errors import SteerError
from vllm_steer.hf import sites
from vllm_steer.hf.language_model import backbone, text_config
from vllm_steer.untrusted_text import shown

Pick = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SelectedTokens:
    """The token ids of a text, and the ascending positions of the tokens to read."""

    ids: Sequence[int]
    kept: Sequence[int]


@dataclass(frozen=True)
class Recording:
    """The activations of the last forward pass at one site, by layer."""

    pick: Pick
    at: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [..., width]

    def stacked(self) -> torch.Tensor:
        """``[..., layers, width]``, float32 or float64, on the CPU."""
        return torch.stack([sites.widened(self.at[layer]).cpu() for layer in sorted(self.at)], -2)

    def keep(self, layer: int) -> sites.Act:
        """A hook that records a layer's picked activations and changes nothing."""

        def act(x: torch.Tensor) -> torch.Tensor:
            # A copy: a view would keep every token of every layer in memory.
            self.at[layer] = self.pick(x.detach()).clone()
            return x

        return act


@contextmanager
def recorded(model: Any, site: str, layers: Sequence[int], pick: Pick) -> Iterator[Recording]:
    """Within the block, each forward pass of ``model`` leaves its activations in the recording.

    ``pick`` takes from ``[batch, tokens, width]`` what is kept of it. Raises ``SteerError`` for a
    model, a layer or a site that is not there.
    """
    names, blocks, recording = sites.family(model), sites.layers_of(model), Recording(pick)
    sites.check_layers_exist(tuple(layers), len(blocks))
    with ExitStack() as hooks:
        for layer in layers:
            handle = sites.attach(blocks[layer], names, site, recording.keep(layer))
            hooks.callback(handle.remove)
        yield recording


def all_layers(model: Any) -> tuple[int, ...]:
    """Every decoder layer of a model."""
    return tuple(range(text_config(model).num_hidden_layers))


def context_length(model: Any, max_tokens: int) -> int:
    """``max_tokens``, or the model's ``max_position_embeddings`` if that is smaller."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return min(max_tokens, limit or max_tokens)


@torch.no_grad()
def read_tokens(
    model: Any,
    texts: Iterable[SelectedTokens],
    *,
    site: str,
    layers: Sequence[int],
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """For each text in turn ``[kept, layers, width]``, float32 (float64 of a float64 model).

    Texts are taken ``batch_size`` at a time and padded on the right, where causal attention never
    sees the padding. Layers ascend. Raises ``SteerError`` as ``recorded`` does.
    """
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, batch_size)):
        rows = [torch.tensor(text.ids) for text in batch]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        selected = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, text in enumerate(batch):
            selected[row, list(text.kept)] = True
        pick = _pick_selected(selected.to(model.device))
        with recorded(model, site, layers, pick) as recording:
            backbone(model)(input_ids=tokens, use_cache=False)
        yield from torch.split(recording.stacked(), [len(text.kept) for text in batch])


def _pick_selected(selected: torch.Tensor) -> Pick:
    # On the layer's own device: a model may lie on several.
    return lambda x: x[selected.to(x.device)]


def activations(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
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

    Raises ``SteerError`` for a text without such tokens, and for a model, a layer or a site that
    does not exist.

    >>> from vllm_steer.fit import activations
    >>> from vllm_steer.models import load_language_model
    >>> small = load_language_model("embedded")
    >>> (rows,) = activations(small.model, small.tokenizer, ["A dog."], site="resid", layers=[1])
    >>> rows.ndim, rows.shape[1]
    (3, 1)
    """
    encoded = (encode(tokenizer, text, max_length) for text in texts)
    yield from read_tokens(model, encoded, site=site, layers=layers, batch_size=batch_size)


def encode(tokenizer: Any, text: str, max_length: int) -> SelectedTokens:
    """A text's ids and the positions of all but its special tokens; ``SteerError`` for none."""
    ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    special = set(tokenizer.all_special_ids)
    positions = [position for position, token in enumerate(ids) if token not in special]
    if not positions:
        raise SteerError(f"text {shown(text)} has no token but special ones")
    return SelectedTokens(ids, positions)
