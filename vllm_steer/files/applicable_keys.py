"""Which metadata keys apply to which kind of steer."""

from typing import Final

from vllm_steer.errors import SteerError
from vllm_steer.files.steer_metadata import SteerMetadata
from vllm_steer.steers import KINDS
from vllm_steer.steers.sites import HEAD

_LM_STEER: Final = ("lm_steer",)
_CONDITION: Final = ("condition",)
_WITH_MODES: Final = ("vector", "sae")
_KINDS_OF: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("variant", "epsilon", "fixed_columns", "columns"), _LM_STEER),
    **dict.fromkeys(("mode", "low", "high"), _WITH_MODES),
    "schedule": ("delta",),
    **dict.fromkeys(("threshold", "similarity", "side", "tokens"), _CONDITION),
    "layers": tuple(kind for kind in KINDS if kind != "lm_steer"),
    "default_strength": tuple(kind for kind in KINDS if kind != "condition"),
}
"""The kinds that a key applies to; a key that is not listed applies to all of them."""


def check_keys_apply(kind: str, overrides: SteerMetadata) -> None:
    """Raise ``SteerError`` for metadata that does not apply to a steer of this kind."""
    inapplicable = [
        name
        for name, kinds in _KINDS_OF.items()
        if kind not in kinds and getattr(overrides, name) is not None
    ]
    if kind == "lm_steer" and overrides.site not in (None, HEAD):
        inapplicable.append("site")
    if inapplicable:
        raise SteerError(
            f"{', '.join(inapplicable)} does not apply to a steer of kind {kind}; remove the key"
        )


def split_keys(metadata: SteerMetadata, kind: str) -> tuple[SteerMetadata, SteerMetadata]:
    """The keys that only ``kind`` has, and all others; ``kind`` itself is in neither."""
    own = {name for name, kinds in _KINDS_OF.items() if kinds == (kind,)}
    others = set(SteerMetadata.model_fields) - own
    return (
        metadata.model_copy(update=dict.fromkeys(others)),
        metadata.model_copy(update=dict.fromkeys((*own, "kind"))),
    )
