"""Reads a folder that ``ReftModel.save`` of pyreft writes: a file per intervention.

The layers and the place of each intervention are in the files' names, which are its keys, and
``config.json`` names the type of each intervention:

    intkey_layer_15_comp_block_output_unit_pos_nunit_1#0.bin        (points in older versions)
    intkey_comp_model_layers[15]_output_unit_pos_nunit_1#0.bin

| component          | site and layer        |
|--------------------|-----------------------|
| `block_output`     | `resid`, layer `N`    |
| `block_input`      | `resid`, layer `N - 1`|
| `attention_output` | `attn_out`, layer `N` |
| `attention_input`  | `attn_in`, layer `N`  |

pyreft acts on the positions of the prompt that the user gives in training and in use, which no file
holds; a request says them as its phase. A key that ends in ``#1`` acts at other positions than that
of ``#0`` with weights of its own, so it cannot be a part of the same steer, unless they share them.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from vllm_steer.errors import SteerError
from vllm_steer.files import pyreft, torch_file
from vllm_steer.files.archive import open_archive
from vllm_steer.files.build import build_low_rank
from vllm_steer.files.json_text import read_json_object
from vllm_steer.files.size_limits import MAX_TENSORS
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import LowRankSteer
from vllm_steer.untrusted_text import listed, shown

NAME = "a folder of pyreft"
_CONFIG: Final = "config.json"
_PREFIX, _SUFFIX = "intkey_", ".bin"
_BY_LAYER: Final = re.compile(
    r"intkey_layer[._](?P<layer>[0-9]{1,4})[._]comp[._](?P<component>[a-z_]+)"
    r"[._]unit[._](?P<unit>.+)[._]nunit[._][0-9]+#[0-9]+\.bin"
)
_BY_PATH: Final = re.compile(
    r"intkey_comp[._](?:\w+[._])*(?:layers|h|blocks)\[(?P<layer>[0-9]{1,4})\][._](?P<component>input"
    r"|output)[._]unit[._](?P<unit>.+)[._]nunit[._][0-9]+#[0-9]+\.bin"
)
_PLACES: Final[dict[str, tuple[Any, int]]] = {
    "block_output": ("resid", 0),
    "output": ("resid", 0),
    "block_input": ("resid", -1),
    "input": ("resid", -1),
    "attention_output": ("attn_out", 0),
    "attention_input": ("attn_in", 0),
}
_TYPE: Final = re.compile(r"(\w+?)Intervention(_IdentityInit)?")


class _Place(NamedTuple):
    site: Any
    layer: int


def is_folder(path: Path) -> bool:
    """True for a folder with a ``config.json`` and a file of an intervention."""
    return os.path.isfile(path / _CONFIG) and bool(_names(path))


def read(path: Path, overrides: SteerMetadata) -> LowRankSteer:
    """One map per layer; ``overrides.layers`` select some of them.

    Raises ``SteerError`` for interventions at several sites or of different ranks, and for two in
    one layer.
    """
    method = _method(read_json_object(path / _CONFIG, _CONFIG))
    maps: dict[_Place, dict[str, torch.Tensor]] = {}
    for name in _names(path):
        place, tensors = _place(name), _map_in(path / name, method)
        if place in maps and not _equal(maps[place], tensors):
            raise SteerError(
                f"{name}: it has two interventions with weights of their own in layer "
                f"{place.layer}, for different positions; give one file with the key layers"
            )
        maps[place] = tensors
    sites = sorted({place.site for place in maps})
    if len(sites) != 1:
        raise SteerError(
            f"its interventions are at the sites {', '.join(sites)} and a steer has one; give one "
            "file with the keys layers and site"
        )
    places = sorted(maps, key=lambda place: place.layer)
    shapes = {place.layer: list(maps[place]["a"].shape) for place in places}
    if len({tuple(shape) for shape in shapes.values()}) != 1:
        raise SteerError(f"its maps are {shown(shapes)} by layer; expected one rank and width")
    stacked = {name: torch.stack([maps[p][name] for p in places]) for name in maps[places[0]]}
    metadata = overrides.completed_by(SteerMetadata(site=sites[0]))
    return build_low_rank(stacked, [place.layer for place in places], metadata)


def _names(path: Path) -> list[str]:
    """The names of the interventions' files, sorted; empty for what is no folder."""
    try:
        with os.scandir(path) as entries:
            found = [e.name for e in entries if e.name.startswith(_PREFIX) and e.is_file()]
    except OSError:
        return []
    names = sorted(name for name in found if name.endswith(_SUFFIX))
    if len(names) > MAX_TENSORS:
        raise SteerError(f"{path}: it has {len(names)} interventions; at most {MAX_TENSORS}")
    return names


def _place(name: str) -> _Place:
    match = _BY_LAYER.fullmatch(name) or _BY_PATH.fullmatch(name)
    if match is None or match["component"] not in _PLACES:
        raise SteerError(
            f"{shown(name)}: its place has no site; allowed: layer N and block_output, "
            "block_input, attention_output or attention_input"
        )
    if match["unit"] != "pos":
        raise SteerError(f"{shown(name)}: its unit is {shown(match['unit'])}; expected pos")
    site, offset = _PLACES[match["component"]]
    layer = int(match["layer"]) + offset
    if layer < 0:
        raise SteerError(f"{shown(name)}: the input of block 0 cannot be steered")
    return _Place(site, layer)


def _map_in(path: Path, method: str) -> dict[str, torch.Tensor]:
    try:
        with open_archive(path) as archive:
            if not torch_file.is_torch(archive.records):
                raise SteerError("not a file of torch.save")
            state = torch_file.load(torch_file.read_names(archive), {})
        if not pyreft.is_intervention(state):
            keys = listed(state, none="no keys") if isinstance(state, Mapping) else shown(state)
            raise SteerError(f"its content is {keys}; expected {pyreft.NAME}")
        return pyreft.map_of(state, method)
    except SteerError as error:
        raise SteerError(f"{path.name}: {error}") from error


def _method(config: Mapping[str, Any]) -> str:
    """The type of all interventions, by ``intervention_types``."""
    types = config.get("intervention_types")
    if not isinstance(types, list) or not types or not all(isinstance(t, str) for t in types):
        raise SteerError(
            f"{_CONFIG}: intervention_types is {shown(types)}; expected the types of pyreft's "
            "interventions"
        )
    names = sorted({type_name.rpartition(".")[2].removesuffix("'>") for type_name in types})
    match = _TYPE.fullmatch(names[0])
    if len(names) != 1 or match is None or match[1] not in pyreft.METHODS:
        allowed = ", ".join(f"{method}Intervention" for method in pyreft.METHODS)
        raise SteerError(
            f"{_CONFIG}: intervention_types has {listed(names)}; expected one of {allowed}"
        )
    return match[1]


def _equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)
