"""The results of all architectures as a Markdown table."""

from collections.abc import Mapping
from typing import Any, Final

from vllm_steer.families import FAMILIES, SELF_TESTED
from vllm_steer.steers.layers import format_layers

SITES: Final = ("resid", "attn_in", "attn_out", "heads")
EQUAL: Final = 1e-4
"""The largest difference of a log-probability that counts as equal to Hugging Face."""


def architectures(data: Mapping[str, Any]) -> str:
    """Served architectures, then those that were not run, by reason."""
    rows = data["rows"]
    lines = ["| architecture | proof | resid | attn_in | attn_out | heads | in this run |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    lines += [_line(row) for row in rows if "sites" in row]
    left_out = [
        f"**{heading}** ({len(names)}): {', '.join(names)}."
        for heading, named in (
            ("Transformers has no class of this name", _is_missing),
            ("No tiny model came out of its config, or vLLM did not start it on a CPU", _is_other),
        )
        if (names := [row["architecture"] for row in rows if "sites" not in row and named(row)])
    ]
    return "\n".join([*lines, *(f"\n{text}" for text in left_out)])


def _is_missing(row: Mapping[str, Any]) -> bool:
    return "transformers has no attribute" in row["reason"]


def _is_other(row: Mapping[str, Any]) -> bool:
    return not _is_missing(row)


def _line(row: Mapping[str, Any]) -> str:
    name = row["architecture"]
    proof = "compared" if name in {**FAMILIES, **SELF_TESTED} else "self-test"
    cells = [_site(row["sites"][site]) for site in SITES]
    return f"| {name} | {proof} | {' | '.join(cells)} | {_distance(row.get('compared', {}))} |"


def _site(found: Mapping[str, Any]) -> str:
    if not found["layers"]:
        return "no"
    return f"layers {format_layers(found['layers'])}" if found["refused"] else "yes"


def _distance(compared: Mapping[str, float]) -> str:
    sites = [compared[site] for site in SITES if site in compared]
    if not sites:
        return "-"
    return f"equal ({max(sites):.0e})" if max(sites) <= EQUAL else f"DIFFERS ({max(sites):.0e})"
