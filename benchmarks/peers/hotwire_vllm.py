"""hotwire-vllm: vectors added in the layers by a custom op inside the compiled model.

It needs a CUDA card (a Triton kernel and vLLM's GPU model runners) and a model whose layers are
called ``*DecoderLayer``: a Llama, no GPT-2. Written after the interface of version 0.1.2, in which
each pair of vector and layer takes a slot of the table that ``HOTWIRE_SLOTS`` sizes, and a request
names one vector, layer and scale per entry; it has not been run. Without a card the result says
``skipped``.
"""

import json
import os
from pathlib import Path
from typing import Any

from dummy_model import STRENGTH

from peers.alone import compare_alone
from peers.engines import Rewritten, serve, software
from peers.job import Job

NAME = "guided"


class HotwireEngine(Rewritten):
    """Requests that ask for a steer get the vector in every layer."""

    def __init__(self, llm: Any, layers: int) -> None:
        super().__init__(llm)
        self._layers = layers

    def request(self, steer: str | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """hotwire's own argument."""
        if steer is None:
            return None, {}
        name, _, strength = steer.partition(":")
        entries = [{"id": name, "layer": n, "scale": float(strength)} for n in range(self._layers)]
        return {"hotwire": json.dumps(entries)}, {}


def measure(job: Job) -> list[dict[str, Any]]:
    """hotwire alone, at each batch size."""
    layers = job.dimensions.layers
    os.environ |= {
        "VLLM_PLUGINS": "hotwire",
        "HOTWIRE_VECTORS": str(Path(job.steers) / f"{NAME}.pt"),
        "HOTWIRE_SLOTS": str(2 * layers),
    }
    peer = HotwireEngine(serve(job), layers)
    asked = f"{NAME}:{STRENGTH}"
    return compare_alone(job, peer, asked, software("hotwire-vllm", "vllm"))
