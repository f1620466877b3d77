"""Trial steers: random steers of realistic size for each kind, site and mode."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, cast

import torch

from vllm_steer.doctor.architecture import Architecture, head_of
from vllm_steer.fit.relative_size import SHORT_TEXTS
from vllm_steer.hf import sites
from vllm_steer.steers import DeltaSteer, LMSteer, Steer, VectorSteer
from vllm_steer.steers.sites import VectorSite
from vllm_steer.steers.vector import Mode

TOKENS: Final = 8
"""Tokens that each request generates, and steps of the delta."""
_RANK: Final = 8
_INSIDE: Final[Mapping[str, tuple[str, Mode]]] = {
    "resid-add": ("resid", "add"),
    "resid-rotate": ("resid", "rotate"),
    "attn_in-rotate": ("attn_in", "rotate"),
    "attn_out-add": ("attn_out", "add"),
}

Sizes = Mapping[str, torch.Tensor]
"""Mean activation norm per site, ``[layers]``; for centred logits ``[1]``."""


def prompts(architecture: Architecture, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts: fixed texts, or random ids if the tokenizer is missing or unusable.

    A tokenizer is unusable if it yields a single token or ids beyond the vocabulary.
    """
    if tokenizer is not None:
        texts = [list(tokenizer(text)["input_ids"]) for text in SHORT_TEXTS]
        if all(len(ids) > 1 and max(ids) < architecture.vocab_size for ids in texts):
            return texts
    generator = torch.Generator().manual_seed(3)
    shape = (len(SHORT_TEXTS), TOKENS)
    ids = torch.randint(architecture.vocab_size, shape, generator=generator)
    return [[int(token) for token in row] for row in ids]


@torch.no_grad()
def measure_sizes(model: Any, architecture: Architecture, texts: Sequence[list[int]]) -> Sizes:
    """Mean activation norm per site over the prompts, without the first token (attention sink)."""
    norms: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as hooks:
        for site in architecture.widths:
            act = _norm_recorder(norms.setdefault(site, []))
            for layer in sites.layers_of(model):
                handle = sites.attach(layer, sites.family(model), site, act)
                hooks.callback(handle.remove)
        for ids in texts:
            tokens = torch.tensor([ids], device=model.device)
            record_logits = _norm_recorder(norms.setdefault("logits", []))
            logits = model(input_ids=tokens, use_cache=False).logits.float()
            record_logits(logits - logits.mean(-1, keepdim=True))
    return {
        site: torch.stack(values).view(len(texts), -1).mean(0) for site, values in norms.items()
    }


def _norm_recorder(norms: list[torch.Tensor]) -> sites.Act:
    """A hook that records the mean norm of its input and returns it unchanged."""

    def act(x: torch.Tensor) -> torch.Tensor:
        norms.append(x[0, 1:].float().norm(dim=-1).mean().cpu())
        return x

    return act


def trial_steers(architecture: Architecture, sizes: Sizes) -> dict[str, Steer]:
    """Random steers by name, one for each kind, site and mode that the model supports.

    At its strength, a steer changes an activation by about the activation's own norm. A random
    product ``P1 P2^T`` of rank r scales a vector of width d by ``sqrt(r d)``; random vectors in L
    layers add up in the residual stream to ``sqrt(L)`` times one of them.
    """
    normal = Normal(torch.Generator().manual_seed(17))
    steers: dict[str, Steer] = {}
    width, layers = architecture.hidden_size, tuple(range(architecture.num_layers))
    if head_of(architecture.model) is not None:
        steers["head-multiply"] = LMSteer(
            variant="multiply",
            projector1=normal(1, width, _RANK),
            projector2=normal(1, width, _RANK),
            epsilon=(_RANK * width) ** -0.5,
            hidden_size=width,
        )
        offset = normal(1, architecture.vocab_size)
        steers["head-offset"] = LMSteer(
            variant="offset",
            offset=offset / offset.norm() * sizes["logits"],
            epsilon=1.0,
            hidden_size=width,
        )
    for name, (site, mode) in _INSIDE.items():
        if site in architecture.widths:
            size = sizes[site] * share(site, architecture.num_layers)
            vectors = normal.sized(size, architecture.widths[site])
            steers[name] = VectorSteer(
                vectors=vectors, layers=layers, site=cast(VectorSite, site), mode=mode
            )
    if "heads" in architecture.widths:
        rows = [normal.sized(sizes["heads"], architecture.widths["heads"]) for _ in range(TOKENS)]
        steers["heads-delta"] = DeltaSteer(delta=torch.stack(rows), layers=layers)
    return steers


def trial_strength(name: str, steer: Steer, sizes: Sizes) -> float:
    """The strength at which a trial steer changes an activation by about the activation's own norm.

    A rotating steer has directions of norm 1; its strength is the mean norm over the layers.
    """
    if isinstance(steer, VectorSteer) and steer.mode == "rotate":
        return round(float(sizes[steer.site].mean()) * share(steer.site, len(steer.layers)), 3)
    return 1.0


def share(site: str, num_layers: int) -> float:
    """The share of one layer, for a site where the changes of all layers add up."""
    return num_layers**-0.5 if site == "resid" else 1.0


class Normal:
    """Standard normal tensors of one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def sized(self, norms: torch.Tensor, width: int) -> torch.Tensor:
        """Random rows with the given norms, ``[len(norms), width]``."""
        rows = self(len(norms), width)
        sized: torch.Tensor = rows / rows.norm(dim=-1, keepdim=True) * norms[:, None]
        return sized
