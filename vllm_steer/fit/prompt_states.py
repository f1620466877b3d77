"""Hidden states of prompts, reduced where they are read: those of long prompts take gigabytes.

Prompts are padded on the right, where causal attention never sees the padding.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from vllm_steer.fit.activations import SelectedTokens, recorded
from vllm_steer.hf import sites
from vllm_steer.hf.conditions import similarity
from vllm_steer.hf.language_model import backbone
from vllm_steer.steers import ConditionSteer

Extremes = Mapping[int, tuple[float, float]]
"""By layer the smallest and the largest similarity of a prompt's tokens."""


@torch.no_grad()
def mean_states(
    model: nn.Module,
    prompts: Iterable[SelectedTokens],
    *,
    site: str,
    layers: Sequence[int],
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """For each prompt in turn ``[layers, width]``: the mean over its selected tokens, float32
    (float64 of a float64 model), on the CPU. Layers ascend.
    """
    for batch, tokens in _batches(model, prompts, batch_size):
        selected = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, prompt in enumerate(batch):
            selected[row, list(prompt.kept)] = True
        with recorded(model, site, layers, _MeanOf(selected)) as recording:
            backbone(model)(input_ids=tokens, use_cache=False)
        yield from recording.stacked()


@torch.no_grad()
def similarity_extremes(
    model: nn.Module,
    prompts: Iterable[SelectedTokens],
    conditions: Sequence[ConditionSteer],
    *,
    batch_size: int,
) -> Iterator[Extremes]:
    """For each prompt in turn, the extremes of its tokens' similarity to each condition.

    The conditions are of one site, and each of another layer.
    """
    names, blocks = sites.family(model), sites.layers_of(model)
    for batch, tokens in _batches(model, prompts, batch_size):
        found: dict[int, torch.Tensor] = {}
        with ExitStack() as hooks:
            for condition in conditions:
                (layer,) = condition.layers
                act = _SimilaritiesOf(condition, found)
                hooks.callback(sites.attach(blocks[layer], names, condition.site, act).remove)
            backbone(model)(input_ids=tokens, use_cache=False)
        for row, prompt in enumerate(batch):
            own = {layer: values[row, : len(prompt.ids)] for layer, values in found.items()}
            yield {layer: (float(v.min()), float(v.max())) for layer, v in own.items()}


class _MeanOf:
    """Picks the mean over the selected tokens of each row, ``[batch, width]``."""

    def __init__(self, selected: torch.Tensor) -> None:
        self.selected = selected  # [batch, tokens] bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        selected = self.selected.to(x.device)
        own = sites.widened(x).masked_fill(~selected[..., None], 0.0)
        mean: torch.Tensor = own.sum(1) / selected.sum(1, keepdim=True)
        return mean


class _SimilaritiesOf:
    """A hook that keeps the similarities of a layer's tokens, ``[batch, tokens]``."""

    def __init__(self, condition: ConditionSteer, found: dict[int, torch.Tensor]) -> None:
        self.condition, self.found = condition, found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self.condition.layers
        self.found[layer] = similarity(self.condition, x).cpu()
        return x


def _batches(
    model: nn.Module, prompts: Iterable[SelectedTokens], batch_size: int
) -> Iterator[tuple[list[SelectedTokens], torch.Tensor]]:
    """Prompts a batch at a time, and their ids ``[batch, tokens]`` on the model's device."""
    remaining = iter(prompts)
    while batch := list(itertools.islice(remaining, batch_size)):
        rows = [torch.tensor(prompt.ids) for prompt in batch]
        yield batch, nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)  # type: ignore[arg-type]
