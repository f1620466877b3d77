"""``runtime:`` in a steer config: steers that are loaded and unloaded while the engine serves."""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from vllm_steer.errors import SteerError
from vllm_steer.files.steer_metadata import PositiveInt
from vllm_steer.steers.layers import parse_layers
from vllm_steer.steers.sae import SAEMode
from vllm_steer.steers.sites import DeltaSite
from vllm_steer.steers.vector import Mode

ALL: Final = "all"
Count = Annotated[int, Field(ge=0, strict=True)]
RoomMode = Literal[Mode, SAEMode]


def _layers(value: Any) -> Any:
    if value == ALL or value is None:
        return None
    try:
        return parse_layers(value)
    except SteerError as error:
        raise ValueError(str(error)) from None


class Room(BaseModel):
    """Device memory that is reserved at start-up for steers loaded at run time.

    lm_steers    LM-Steers at once, each of up to ``max_rank`` ranks over all of its columns
    offsets      LM-Steers of variant ``offset`` at once: they are as wide as the vocabulary
    sites        the sites inside the layers that have room, in ``layers`` (all that have the site)
    vectors      vector steers and features of autoencoders at once, at each of the ``sites`` but
                 ``heads``, which has none
    delta_steps  steps of all delta steers together, at each of the ``sites``
    low_rank_maps  low-rank maps at once, at each of the ``sites`` but ``heads``, each of up to
                 ``max_map_rank`` ranks
    conditions   conditions at once, at each of the ``sites`` but ``heads``
    modes        what vectors may do (``add``, ``rotate``, ``project``, ``relative``), and features
                 of autoencoders (``add``, ``clamp``, ``scale``)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm_steers: Count = 8
    max_rank: PositiveInt = 1024
    offsets: Count = 0
    vectors: Count = 32
    delta_steps: Count = 64
    low_rank_maps: Count = 0
    max_map_rank: PositiveInt = 16
    conditions: Count = 0
    sites: tuple[DeltaSite, ...] = ("resid",)
    layers: Annotated[tuple[int, ...] | None, BeforeValidator(_layers)] = None
    modes: tuple[RoomMode, ...] = ("add", "rotate")

    @field_validator("sites", "modes")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("names one twice; each may be there once")
        return names

    @model_validator(mode="after")
    def _has_some(self) -> "Room":
        if not (self.lm_steers or self.offsets or self.layer_sites):
            raise ValueError(
                "reserves nothing: give lm_steers; or at sites vectors, delta_steps, low_rank_maps "
                "or conditions (heads has room for delta_steps only)"
            )
        return self

    @property
    def layer_sites(self) -> tuple[str, ...]:
        """The sites inside the layers that have room."""
        at_all_but_heads = self.vectors or self.low_rank_maps or self.conditions
        return tuple(
            site
            for site in self.sites
            if self.delta_steps or (at_all_but_heads and site != "heads")
        )

    @property
    def has_conditions(self) -> bool:
        """Whether there is room for conditions."""
        return bool(self.conditions and set(self.layer_sites) - {"heads"})

    @property
    def has_maps(self) -> bool:
        """Whether there is room for low-rank maps."""
        return bool(self.low_rank_maps and set(self.layer_sites) - {"heads"})

    @property
    def reads(self) -> bool:
        """Whether there is room for directions whose strength depends on a reading of the token."""
        return bool(self.vectors and {"project", "clamp", "scale"} & set(self.modes))


class RuntimeConfig(BaseModel):
    """Whether and how steers are loaded at run time.

    folders      the folders that ``steer_path`` may point into; none: no paths
    upload_mib   the largest file over HTTP, in MiB; 0: no files over HTTP
    room         the device memory that is reserved
    state        a folder that keeps what is loaded over a restart; None: nothing is kept
    unprotected  changes over HTTP need no key
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = False
    folders: tuple[Path, ...] = ()
    upload_mib: Count = 64
    room: Room = Room()
    state: Path | None = None
    unprotected: bool = False
