"""Digest of a steer's effect, independent of file name and description."""

import hashlib
import json

import torch

from vllm_steer.steers import DeltaSteer, Steer, VectorSteer
from vllm_steer.steers.checks import pieces


def content_digest(steer: Steer) -> str:
    """SHA-256 of the steer's tensors and of all metadata that determines their effect.

    Names, descriptions, the file's dtype and the options of a request (strength, layers, phase,
    schedule) are not included.
    """
    effect: dict[str, object] = {"kind": steer.kind, "site": steer.site, "layers": steer.layers}
    if isinstance(steer, VectorSteer):
        effect |= {"mode": steer.mode}
    elif not isinstance(steer, DeltaSteer):
        effect |= {"epsilon": steer.epsilon, "fixed_columns": steer.fixed_columns}
    digest = hashlib.sha256(json.dumps(effect, sort_keys=True).encode())
    for name, tensor in sorted(steer.tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        for piece in pieces(tensor):
            digest.update(piece.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
