"""Trial steers of the kinds that read the token, of a window of tokens, and of a condition.

They run in an engine of their own: steers that read, and conditions, make an engine choose other
kernels for all steers of a site.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch

from vllm_steer.doctor.architecture import Architecture
from vllm_steer.doctor.trials import Normal, share
from vllm_steer.fit.relative_size import read_activations
from vllm_steer.request.gates import CONDITION
from vllm_steer.steers import ConditionSteer, LowRankSteer, SAESteer, Steer, VectorSteer
from vllm_steer.steers.sites import VECTOR_SITES, VectorSite

Options = Mapping[str, Any]
States = Mapping[int, torch.Tensor]
"""By layer the activations of the prompts at a site, ``[tokens, width]`` float32, on the CPU."""

GATED: Final = "resid-when"
"""The trial whose steer acts where the condition ``CONDITION`` holds."""
_RANK: Final = 8
_KINDS: Final[Mapping[str, tuple[VectorSite, str]]] = {
    "resid-project": ("resid", "project"),
    "resid-relative": ("resid", "relative"),
    "resid-clamp": ("resid", "clamp"),
    "resid-low_rank": ("resid", "low_rank"),
    "resid-window": ("resid", "add"),
    GATED: ("resid", "add"),
    "attn_in-relative": ("attn_in", "relative"),
    "attn_in-low_rank": ("attn_in", "low_rank"),
    "attn_out-project": ("attn_out", "project"),
    "attn_out-scale": ("attn_out", "scale"),
}
_WINDOW: Final = {"prompt": ["1:3"], "answer": "2:6"}
_FEATURE_BOUNDS: Final = {"low": 2.0, "high": 3.0}  # a mean token has a feature of about 1


def reading_trials(
    model: Any, architecture: Architecture, texts: Sequence[list[int]]
) -> tuple[dict[str, Steer], dict[str, Options]]:
    """Random steers by name, and the options with which a request asks for each.

    They change an activation by about its own norm at ``attn_in`` and ``attn_out``, and in all
    layers together at ``resid``. Projections and features read the direction of the mean
    activation, so that what is read counts; bounds are those of the request. The steer ``GATED``
    acts in the layers from that of ``CONDITION`` on, which holds for some of the ``texts`` only.
    Empty for a model without the sites.
    """
    present: list[VectorSite] = [site for site in VECTOR_SITES if site in architecture.widths]
    states = {
        site: {layer: x.cpu() for layer, x in read_activations(model, texts, site).items()}
        for site in present
    }
    normal = Normal(torch.Generator().manual_seed(23))
    steers: dict[str, Steer] = {}
    options: dict[str, Options] = {}
    for name, (site, kind) in _KINDS.items():
        if site in states:
            first = _condition_layer(architecture) if name == GATED else 0
            layers = {layer: x for layer, x in states[site].items() if layer >= first}
            steers[name] = _MAKE[kind](kind, site, layers, normal)
            options[name] = _options(name, site, kind, states[site])
    if "resid" in states:
        steers[CONDITION] = _condition(model, architecture, texts)
    return steers, options


def _options(name: str, site: VectorSite, kind: str, states: States) -> Options:
    if kind == "project":
        parts = [float((x @ _mean_direction(x)).mean()) for x in states.values()]
        return {"strength": 0.5, "low": 0.0, "high": round(min(parts) / 2, 4)}
    if kind == "relative":
        return {"strength": round(share(site, len(states)), 4)}
    if kind == "clamp":
        return {"strength": 1.0, **_FEATURE_BOUNDS}
    if name == GATED:
        return {"strength": 1.0, "when": CONDITION}
    return {"strength": 1.0, **({"phase": _WINDOW} if name == "resid-window" else {})}


def _vector(kind: str, site: VectorSite, states: States, normal: Normal) -> Steer:
    width = next(iter(states.values())).shape[1]
    sizes = _sizes(site, states)
    vectors = normal.sized(sizes, width)
    if kind == "project":
        vectors = torch.stack([_mean_direction(x) for x in states.values()])
    return VectorSteer(vectors=vectors, layers=tuple(states), site=site, mode=cast(Any, kind))


def _low_rank(kind: str, site: VectorSite, states: States, normal: Normal) -> Steer:
    """A random product of rank r scales a vector of width d by ``sqrt(r d)``; the bias adds as
    much again.
    """
    sizes, shape = _sizes(site, states), (len(states), _RANK)
    width = next(iter(states.values())).shape[1]
    scale = share(site, len(states))
    return LowRankSteer(
        a=normal(*shape, width) * scale / width**0.5,
        b=normal(len(states), width, _RANK) / _RANK**0.5,
        bias=normal(*shape) * (sizes / width**0.5)[:, None],
        layers=tuple(states),
        site=site,
    )


def _feature(kind: str, site: VectorSite, states: States, normal: Normal) -> Steer:
    """A feature of about 1 for a mean token, whose decoder has the size of the change."""
    directions = {layer: _mean_direction(x) for layer, x in states.items()}
    parts = {layer: (x @ directions[layer]).mean() for layer, x in states.items()}
    width = next(iter(states.values())).shape[1]
    return SAESteer(
        encoder=torch.stack([directions[layer] / parts[layer] for layer in states]),
        decoder=normal.sized(_sizes(site, states), width),
        bias=torch.full((len(states),), 0.1),
        threshold=torch.full((len(states),), 0.2),
        layers=tuple(states),
        site=site,
        mode=cast(Any, kind),
    )


_MAKE: Final[Mapping[str, Callable[..., Steer]]] = {
    **dict.fromkeys(("add", "project", "relative"), _vector),
    **dict.fromkeys(("clamp", "scale"), _feature),
    "low_rank": _low_rank,
}


def _sizes(site: str, states: States) -> torch.Tensor:
    """The length of a change in each layer, ``[layers]``."""
    norms = torch.stack([x.norm(dim=-1).mean() for x in states.values()]).cpu()
    return norms * share(site, len(states))


def _mean_direction(x: torch.Tensor) -> torch.Tensor:
    """The unit vector ``[width]`` of the mean of some activations."""
    mean = x.mean(0)
    unit: torch.Tensor = mean / mean.norm()
    return unit


def _condition_layer(architecture: Architecture) -> int:
    return architecture.num_layers // 2


@torch.no_grad()
def _condition(
    model: Any, architecture: Architecture, texts: Sequence[list[int]]
) -> ConditionSteer:
    """A condition in the middle of the widest gap between the prompts' similarities.

    Its vector is the difference of the two prompts' last tokens that are least alike.
    """
    layer = _condition_layer(architecture)
    last = [read_activations(model, [ids], "resid")[layer][-1].cpu() for ids in texts]
    units = torch.stack([x / x.norm() for x in last])
    alike = units @ units.T
    one, other = divmod(int(alike.argmin()), len(units))
    vector = units[one] - units[other]
    values = (units @ vector / vector.norm()).sort().values
    gap = int(values.diff().argmax())
    threshold = float(values[gap : gap + 2].mean())
    return ConditionSteer(vector=vector[None], layers=(layer,), threshold=threshold)
