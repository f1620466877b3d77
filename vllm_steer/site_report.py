"""What the self-test found, of all ranks of an engine: by site its layers, its proof, the reasons.

    {"resid": {"proof": "compared", "layers": [0, 1], "refused": {"2": "the layer returns ..."}}}

``proof`` is ``compared``, with Hugging Face in vllm-steer's tests, or ``proved``, by the self-test
of this start.
"""

from collections.abc import Mapping, Sequence
from typing import Any

SiteReport = dict[str, dict[str, Any]]


def join_reports(reports: Sequence[Mapping[str, Any] | None]) -> SiteReport:
    """The reports of all ranks as one; empty where no rank ran the self-test.

    A layer has a site if each rank that has the layer says so.
    """
    joined: SiteReport = {}
    for report in reports:
        for site, one in (report or {}).items():
            found = joined.setdefault(site, {"proof": one["proof"], "layers": [], "refused": {}})
            found["refused"] |= one["refused"]
            layers = {*found["layers"], *one["layers"]}
            found["layers"] = sorted(n for n in layers if str(n) not in found["refused"])
    return joined
