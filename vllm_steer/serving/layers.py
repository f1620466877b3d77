"""The sites inside the layers: forward hooks on the modules of a decoder layer.

A forward hook changes the first tensor that a module returns, in place; torch.compile traces it
with the module. Only layers that a loaded steer touches get one. `heads` is the input of the
attention's output projection: its directions are projected once, so its hook is the attention's.
Conditions are read by hooks of the same kind, which come before those that steer the same site.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from vllm_steer.bank import (
    ConditionTable,
    LayerRoom,
    SiteTable,
    fill_condition_tables,
    fill_layer_bank,
)
from vllm_steer.bank.layers import GuidanceSteer, project_again
from vllm_steer.compat import options
from vllm_steer.compat.patching import version_advice
from vllm_steer.families import decoder_layers, submodule
from vllm_steer.kernels.guidance import GuidanceBackend
from vllm_steer.kernels.lm_steer import LMSteerBackend
from vllm_steer.request.gates import MOST_CONDITIONS
from vllm_steer.selftest.changes import Place
from vllm_steer.serving.condition_site import ConditionSite
from vllm_steer.serving.gates import GateTable
from vllm_steer.serving.mapped_site import MappedSite, SiteLayer
from vllm_steer.serving.model_sites import ModelSites, Run, eager
from vllm_steer.serving.projection import projections
from vllm_steer.serving.site import SteeredSite
from vllm_steer.serving.steering_check import check_steering
from vllm_steer.steers import ConditionSteer
from vllm_steer.steers.sites import LAYER_SITES

_PADDING = 512  # more than vLLM pads a batch by


class SteeredLayers:
    """The sites of one rank's layers where steers act, and those where conditions are read.

    ``at_heads`` are the steers whose directions were projected through the model's weights.
    """

    def __init__(
        self,
        sites: tuple[SteeredSite, ...],
        known: ModelSites,
        at_heads: Mapping[str, GuidanceSteer],
        condition_sites: tuple[ConditionSite, ...] = (),
    ) -> None:
        self.sites = sites
        self.condition_sites = condition_sites
        self._known = known
        self._at_heads = dict(at_heads)

    def attach(self, model: nn.Module, forward_context: dict[str, Any], num_layers: int) -> None:
        """Hook the model's modules and enter their places where the forward context finds them.

        Raises ``SteerError`` if the model lacks a module or returns its stream in another way.
        """
        layers = decoder_layers(model, num_layers)
        for site in self.all_sites:
            is_read = isinstance(site, ConditionSite)
            place = f"conditions.{site.site}" if is_read else site.site
            for index, number in enumerate(site.layers):
                name = f"vllm_steer.{place}.{number}"
                forward_context[name] = SiteLayer(site, index)
                family = self._known.families[number]
                module = self._module(layers[number], number, site)
                is_pair = family.stream == "pair" and module is layers[number]
                needs_stream = is_read or _needs_stream(site)
                module.register_forward_hook(
                    _hook(name, site.site, pair=is_pair, needs_stream=needs_stream)
                )

    @property
    def all_sites(self) -> tuple[MappedSite, ...]:
        """Both kinds of sites in the order of computation: what is read comes first."""
        by_site = {site.site: site for site in self.sites}
        read = {site.site: site for site in self.condition_sites}
        return tuple(
            sites[name] for name in LAYER_SITES for sites in (read, by_site) if name in sites
        )

    def _module(self, layer: nn.Module, number: int, site: MappedSite) -> nn.Module:
        """The module whose output is changed or read.

        A sum can be changed by its last term, but not in an engine with conditions: that these are
        read first is nothing that a compiler sees.
        """
        family = self._known.families[number]
        sums_itself = family.last_term is not None and not self.condition_sites
        if site.site == "resid" and (not sums_itself or _needs_stream(site)):
            return layer
        names = {
            "resid": family.last_term,
            "attn_in": family.input_norm,
            "attn_out": family.attention,
            "heads": family.attention,
        }
        module: nn.Module = submodule(layer, names[site.site], site.site)
        return module

    def check(self, model: nn.Module, vllm_config: Any, run: Run, device: torch.device) -> None:
        """Raise ``SteerError`` for a layer where a steer does not change the forward pass."""
        known = self._known
        first = known.layers[known.local_layers[0]]
        with eager(model), ExitStack() as trials:
            for site in self.sites:
                trials.enter_context(site.table.trial_steer())
            check_steering(
                self.sites,
                self._place,
                first,
                options.hidden_size(vllm_config),
                run,
                max_rows=int(options.max_num_batched_tokens(vllm_config)),
                attention_layers=known.attention_layers,
                device=device,
            )
        for condition_site in self.condition_sites:
            condition_site.reached.clear()  # what the compiled model reaches is still to be seen
        self._known = known.without_modules()

    def _place(self, site: SteeredSite, index: int) -> Place:
        """Where a site's tensor is to be read: the layer's output for the residual stream."""
        number = site.table.layers[index]
        layer, family = self._known.layers[number], self._known.families[number]
        if site.site == "resid":
            return Place(layer, is_pair=family.stream == "pair")
        return Place(self._module(layer, number, site), is_pair=False)

    def project_again(self, model: nn.Module, num_layers: int, dtype: torch.dtype) -> None:
        """Project the directions at ``heads`` through the weights that the model has now."""
        if not self._at_heads:
            return
        project = self.projection(model, num_layers, dtype)
        for site in self.sites:
            if site.table.site == "heads":
                project_again(site.table, self._at_heads, project)

    def table_of(self, site: str) -> SiteTable | None:
        """The table of a site; None if no layer of this rank has one."""
        return next((one.table for one in self.sites if one.table.site == site), None)

    def conditions_of(self, site: str) -> ConditionTable | None:
        """The conditions of a site; None if no layer of this rank has one."""
        tables = (one.table for one in self.condition_sites)
        return next((table for table in tables if table.site == site), None)

    def projection(
        self, model: nn.Module, num_layers: int, dtype: torch.dtype
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """From a layer and rows at its ``heads`` to rows at the output of the projection."""
        return projections(decoder_layers(model, num_layers), self._known.families, dtype)

    def set_at_heads(self, name: str, steer: GuidanceSteer | None) -> None:
        """Keep a steer that is to follow the model's weights, or keep it no longer (None)."""
        if steer is None:
            self._at_heads.pop(name, None)
        else:
            self._at_heads[name] = steer

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what the sites run on, for streams in ``dtype``."""
        for site in self.all_sites:
            site.warm_up(dtype)

    @property
    def num_bytes(self) -> int:
        """Device memory of all tables and maps."""
        tables = sum(site.table.num_bytes for site in self.sites)
        tables += sum(site.table.conditions.num_bytes for site in self.condition_sites)
        return tables + sum(site.num_bytes for site in self.all_sites)

    def unreached_sites(self) -> list[str]:
        """The places that no forward pass has reached so far."""
        return [
            f"{site.site} of layer {number}"
            for site in self.all_sites
            for index, number in enumerate(site.layers)
            if index not in site.reached
        ]

    def start_serving(self) -> None:
        """Start-up is over: forward passes without steered requests are no longer changed."""
        for site in self.all_sites:
            site.start_serving()


def steered_layers(
    steers: Mapping[str, GuidanceSteer],
    vllm_config: Any,
    device: torch.device,
    backend: GuidanceBackend,
    lm_steer: LMSteerBackend | None = None,
    *,
    max_doses: int,
    known: ModelSites,
    room: LayerRoom | None = None,
    conditions: Mapping[str, ConditionSteer] | None = None,
    gates: GateTable | None = None,
) -> SteeredLayers | None:
    """The sites of steers and conditions in the layers of this rank; None if there are none.

    Raises ``SteerError`` for a steer or a condition at a site that one of its layers lacks.
    """
    conditions = conditions or {}
    known.check({**steers, **conditions})
    project = projections(known.layers, known.families, options.dtype(vllm_config))
    bank = fill_layer_bank(
        steers,
        layers=known.local_layers,
        device=device,
        project=project,
        room=room,
    )
    tokens = _max_tokens(vllm_config)
    sites = tuple(
        SteeredSite(
            table,
            backend,
            lm_steer,
            max_doses=max_doses,
            max_tokens=tokens,
            device=device,
            gates=None if gates is None else gates.gates,
            graph_tokens=_graph_tokens(vllm_config, device),
        )
        for table in bank.tables
    )
    condition_sites: tuple[ConditionSite, ...] = ()
    if gates is not None:
        condition_sites = tuple(
            ConditionSite(
                table,
                backend,
                gates.gates,
                max_tests=max_doses * MOST_CONDITIONS,
                max_tokens=tokens,
                device=device,
            )
            for table in fill_condition_tables(
                conditions, layers=known.local_layers, device=device, room=room
            )
        )
    at_heads = {name: steer for name, steer in steers.items() if steer.site == "heads"}
    if not sites and not condition_sites:
        return None
    return SteeredLayers(sites, known, at_heads, condition_sites)


def _graph_tokens(vllm_config: Any, device: torch.device) -> int:
    """Tokens of the largest step that a CUDA graph replays; 0 without graphs."""
    if device.type != "cuda":
        return 0
    return int(options.max_cudagraph_capture_size(vllm_config) or 0)


def _max_tokens(vllm_config: Any) -> int:
    """Rows of the widest hidden state: the largest batch, padded for tensor parallelism."""
    captured = int(options.max_cudagraph_capture_size(vllm_config) or 0)
    most = max(int(options.max_num_batched_tokens(vllm_config)), captured)
    return -(-most // _PADDING) * _PADDING


def _needs_stream(site: MappedSite) -> bool:
    """Whether what a site does depends on the whole tensor, so that its residual is needed."""
    return isinstance(site, SteeredSite) and site.table.needs_stream


def _hook(
    name: str, site: str, *, pair: bool, needs_stream: bool
) -> Callable[[Any, Any, Any], None]:
    """The hook of one place; the residual is handed over only where it is needed."""
    from vllm_steer.serving.steer_op import steer_tokens_

    is_stream = site == "resid" and pair

    def steer(_module: Any, _args: Any, output: Any) -> None:
        if is_stream and not (isinstance(output, tuple) and len(output) == 2):
            raise RuntimeError(
                f"vllm-steer: {name} returned no pair of hidden states and residual, as this model "
                f"should; {version_advice()}"
            )
        steer_tokens_(_first(output), output[1] if is_stream and needs_stream else None, name)

    return steer


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
