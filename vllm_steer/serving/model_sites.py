"""Where the sites of a model are: found and proved by a self-test at start-up."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from vllm_steer.bank.layers import GuidanceSteer
from vllm_steer.compat import options
from vllm_steer.errors import SteerError
from vllm_steer.families import (
    FAMILIES,
    LAYER_SCALES,
    Family,
    check_supported,
    decoder_layers,
    is_compared,
)
from vllm_steer.selftest.find_sites import Kinds, LayerSites, Output, Streams, find_sites
from vllm_steer.site_report import SiteReport
from vllm_steer.steers import ConditionSteer
from vllm_steer.steers.layers import format_layers
from vllm_steer.steers.sites import LAYER_SITES

logger = logging.getLogger("vllm.vllm_steer")

_FEWEST_ROWS = 8

_T = TypeVar("_T")

Proof = Literal["compared", "proved"]
"""Compared with Hugging Face in vllm-steer's tests, or proved by the self-test of this start."""

Run = Callable[[int], Any]
"""A dummy run of so many tokens."""


@dataclass(frozen=True)
class ModelSites:
    """The decoder layers of a model, and the sites of those that this rank has.

    ``reasons`` has, by layer and site, why a layer lacks a site. ``attention_layers`` are vLLM's.
    """

    layers: nn.ModuleList
    families: Mapping[int, Family]
    reasons: Mapping[int, Mapping[str, str]]
    attention_layers: Sequence[nn.Module] = ()
    proof: Proof = "compared"

    @property
    def local_layers(self) -> list[int]:
        """The layers of this rank."""
        return list(self.families)

    def without_modules(self) -> "ModelSites":
        """The same without the model's modules, which a later load of the model may replace."""
        return replace(self, layers=nn.ModuleList(), attention_layers=())

    def report(self) -> SiteReport:
        """By site: the layers of this rank that have it, and by layer the reason of the others."""
        return {
            site: {
                "proof": self.proof,
                "layers": [n for n in self.families if site not in self.reasons.get(n, {})],
                "refused": {
                    str(n): reasons[site] for n, reasons in self.reasons.items() if site in reasons
                },
            }
            for site in LAYER_SITES
        }

    def where_present(self, name: str, steer: GuidanceSteer) -> GuidanceSteer:
        """The steer in those of its layers that have its site; layers of other ranks stay.

        Raises ``SteerError`` if no layer of the model has the site.
        """
        return steer.keep_layers(self.present_layers(name, steer.site, steer.layers))

    def present_layers(self, name: str, site: str, layers: Sequence[int]) -> tuple[int, ...]:
        """Of a steer's layers, those that have its site, and those of other ranks."""
        lacking = {n for n, reasons in self.reasons.items() if site in reasons}
        present = tuple(layer for layer in layers if layer not in lacking)
        if not any(_of_all_stages(bool(set(present) & set(self.families)))):
            reason = next((self.reasons[n][site] for n in layers if n in lacking), "")
            raise SteerError(
                f"steer {name}: none of its layers {format_layers(layers)} has the site "
                f"{site}: {reason or 'they are not layers of this model'}"
            )
        return present

    def check(self, steers: Mapping[str, GuidanceSteer | ConditionSteer]) -> None:
        """Raise ``SteerError`` for a steer that acts where a layer lacks its site."""
        for name, steer in steers.items():
            self.check_layers(f"steer {name}", steer.site, steer.layers)

    def check_layers(self, subject: str, site: str, layers: Sequence[int]) -> None:
        """Raise ``SteerError`` if one of these layers is of this rank and lacks the site."""
        for layer in sorted(set(layers) & set(self.families)):
            reason = self.reasons.get(layer, {}).get(site)
            if reason is not None:
                raise SteerError(
                    f"{subject}: the site {site} cannot be steered in layer {layer}: "
                    f"{reason}; {self._advice(site)}"
                )

    def layers_with(self, site: str) -> tuple[int, ...]:
        """The layers of this rank that have a site."""
        return tuple(n for n in self.families if site not in self.reasons.get(n, {}))

    def room_layers(self, site: str, layers: Sequence[int] | None) -> tuple[int, ...]:
        """The layers of this rank with room at a site: ``layers``, or all that have the site.

        Raises ``SteerError`` for one of ``layers`` without the site, and for a site that no layer
        of the model has.
        """
        subject = "runtime.room"
        having = self.layers_with(site)
        if layers is not None:
            self.check_layers(subject, site, layers)
            return tuple(layer for layer in having if layer in set(layers))
        if not any(_of_all_stages(bool(having))):
            self.check_layers(f"{subject}.sites", site, self.local_layers)
        return having

    def _advice(self, site: str) -> str:
        having = [n for n in self.families if site not in self.reasons.get(n, {})]
        if having:
            return (
                f"layers with this site: {format_layers(having)}; choose some with the key layers"
            )
        sites = [
            other
            for other in LAYER_SITES
            if any(other not in self.reasons.get(n, {}) for n in self.families)
        ]
        return f"no layer of this model has it; available: {', '.join(['head', *sites])}"


def model_sites(model: nn.Module, vllm_config: Any, run: Run) -> ModelSites:
    """The sites of a model's layers on this rank.

    Raises ``SteerError`` if the model is known not to work or its decoder layers are not found.
    """
    architectures = options.architectures(vllm_config)
    check_supported(architectures)
    layers = decoder_layers(model, options.num_layers(vllm_config))
    here = [number for number, layer in enumerate(layers) if not _is_elsewhere(layer)]
    rows = int(options.max_num_batched_tokens(vllm_config))
    if rows < _FEWEST_ROWS:
        raise SteerError(
            f"the self-test of the model needs max_num_batched_tokens of {_FEWEST_ROWS} or more; "
            f"it is {rows}"
        )
    attention_layers = _attention_layers(model, vllm_config)
    known = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
    with eager(model):
        layer_sites = find_sites(
            layers,
            here,
            options.hidden_size(vllm_config),
            run,
            max_rows=rows,
            attention_layers=attention_layers,
            kinds=_kinds(),
            spread=_spread_over_ranks,
            of_first_stage=_of_first_stage,
            over_stages=_over_stages,
            may_scale=bool(LAYER_SCALES & set(architectures)),
            expected=_expected_output(model, known),
        )
    _report(architectures, layer_sites)
    last_term = None if known is None else known.last_term
    return ModelSites(
        layers,
        {number: _family(one, last_term) for number, one in layer_sites.items()},
        {number: one.reasons for number, one in layer_sites.items()},
        attention_layers,
        "compared" if is_compared(architectures) else "proved",
    )


def _expected_output(model: nn.Module, known: Family | None) -> Output | None:
    if known is None:
        return None
    return "tensor" if _on_transformers_backend(model) else known.stream


def _on_transformers_backend(model: nn.Module) -> bool:
    """Whether vLLM runs the model by its Transformers backend: blocks return the stream itself."""
    prefix = "vllm.model_executor.models.transformers"
    return any(cls.__module__.startswith(prefix) for cls in type(model).__mro__)


def _family(layer_sites: LayerSites, last_term: str | None) -> Family:
    return Family(
        last_term=last_term if layer_sites.output == "tensor" else None,
        input_norm=layer_sites.norm,
        attention=layer_sites.attention or "",
        projection=layer_sites.projection or "",
        stream=layer_sites.output or "tensor",
    )


def _report(architectures: Sequence[str], layer_sites: Mapping[int, LayerSites]) -> None:
    """Log what the self-test found, with the reason for each site that is missing."""
    having = {
        site: [number for number, one in layer_sites.items() if site not in one.reasons]
        for site in LAYER_SITES
    }
    available = [
        f"{site} in layers {format_layers(numbers)}" for site, numbers in having.items() if numbers
    ]
    modules = {(one.norm, one.attention, one.projection) for one in layer_sites.values()}
    logger.info(
        "vllm-steer: input norm, attention and its projection are %s",
        " or ".join(sorted(", ".join(str(name) for name in names) for names in modules)),
    )
    name, summary = ", ".join(architectures), "; ".join(available) or "no site inside its layers"
    if is_compared(architectures):
        logger.info("vllm-steer: the self-test of %s found: %s", name, summary)
    else:
        logger.warning(
            "vllm-steer: %s was not compared with Hugging Face; a self-test at start-up found: %s. "
            "To refuse such models set untested: refuse in the steer config.",
            name,
            summary,
        )
    for site, numbers in having.items():
        missing = [number for number in layer_sites if number not in numbers]
        if missing:
            logger.info(
                "vllm-steer: no %s in layers %s: %s",
                site,
                format_layers(missing),
                layer_sites[missing[0]].reasons[site],
            )


def _is_elsewhere(layer: nn.Module) -> bool:
    """Whether another pipeline stage has this layer."""
    return type(layer).__name__ == "PPMissingLayer"


def _kinds() -> Kinds:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import LinearBase

    return Kinds(AttentionLayerBase, LinearBase)


def _attention_layers(model: nn.Module, vllm_config: Any) -> list[nn.Module]:
    modules = (*options.static_forward_context(vllm_config).values(), *model.modules())
    attention: dict[int, Any] = {id(m): m for m in modules if isinstance(m, _kinds().attention)}
    return list(attention.values())


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run a model that vLLM compiles as it is written."""
    compiled = [m for m in model.modules() if getattr(m, "do_not_compile", None) is False]
    for module in compiled:
        module.do_not_compile = True  # type: ignore[assignment]
    try:
        with torch.compiler.set_stance("force_eager"):  # where PyTorch has compiled all of it
            yield
    finally:
        for module in compiled:
            module.do_not_compile = False  # type: ignore[assignment]


def _of_first_stage(value: float) -> float:
    """The value that the first pipeline stage has."""
    return _of_all_stages(value)[0]


def _over_stages(streams: Streams) -> Streams:
    """What all pipeline stages know of their layers' streams; of a class the first that does."""
    known = _of_all_stages(streams)
    return {name: stream for one in reversed(known) for name, stream in one.items()}


def _of_all_stages(value: _T) -> list[_T]:
    """The value that each pipeline stage has, in their order."""
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    if group.world_size == 1:
        return [value]
    values: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def _spread_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The largest less the smallest of each number over the tensor-parallel ranks."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return torch.zeros_like(values)
    highest, lowest = values.clone(), values.clone()
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    torch.distributed.all_reduce(lowest, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return highest - lowest
