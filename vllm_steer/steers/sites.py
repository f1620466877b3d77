"""Where in a model a steer acts: the names of the sites, defined here and nowhere else."""

from typing import Final, Literal, Protocol, get_args

Site = Literal["head", "attn_in", "heads", "attn_out", "resid"]
VectorSite = Literal["resid", "attn_in", "attn_out"]
DeltaSite = Literal["heads", "resid", "attn_in", "attn_out"]

HEAD: Final = "head"
"""The final hidden state, before the LM head, or its logits."""
SITES: Final[tuple[Site, ...]] = get_args(Site)
LAYER_SITES: Final = SITES[1:]
"""The sites inside a decoder layer, in the order in which a layer computes them: where two of them
change the output of one module, the inner one comes first.
"""
VECTOR_SITES: Final[tuple[VectorSite, ...]] = get_args(VectorSite)
DELTA_SITES: Final[tuple[DeltaSite, ...]] = get_args(DeltaSite)


class Sited(Protocol):
    """A steer, or what a plan says of one."""

    @property
    def site(self) -> str: ...


def acts_at_head(steer: Sited) -> bool:
    """Whether a steer acts after the last layer, so that it changes no KV."""
    return steer.site == HEAD
