"""The sites (hook points) at which steers act in a model."""

from typing import Final, Literal, Protocol, get_args

Site = Literal["head", "attn_in", "heads", "attn_out", "resid"]
VectorSite = Literal["resid", "attn_in", "attn_out"]
DeltaSite = Literal["heads", "resid", "attn_in", "attn_out"]

HEAD: Final = "head"
"""The final hidden state, before the LM head, or its logits."""
SITES: Final[tuple[Site, ...]] = get_args(Site)
LAYER_SITES: Final = SITES[1:]
"""The sites inside a decoder layer, in the order of computation. If two of them change the output
of one module, the inner site comes first.
"""
VECTOR_SITES: Final[tuple[VectorSite, ...]] = get_args(VectorSite)
DELTA_SITES: Final[tuple[DeltaSite, ...]] = get_args(DeltaSite)


class HasSite(Protocol):
    """A steer or a planned steer."""

    @property
    def site(self) -> str: ...


def acts_at_head(steer: HasSite) -> bool:
    """True if a steer acts after the last layer, so that it does not change the KV cache."""
    return steer.site == HEAD
