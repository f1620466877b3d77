"""Digest of a steer's effect, independent of file name and description."""

import hashlib
import json

import torch

from vllm_steer.steers import ConditionSteer, LMSteer, SAESteer, Steer, VectorSteer
from vllm_steer.steers.checks import pieces


def content_digest(steer: Steer) -> str:
    """SHA-256 of the steer's tensors and of all metadata that determines their effect.

    Names, descriptions, the file's dtype and the options of a request (strength, layers, phase,
    schedule) are not included.
    """
    effect: dict[str, object] = {"kind": steer.kind, "site": steer.site, "layers": steer.layers}
    if isinstance(steer, LMSteer):
        effect |= {"epsilon": steer.epsilon, "fixed_columns": steer.fixed_columns}
    elif isinstance(steer, VectorSteer | SAESteer):
        effect |= {"mode": steer.mode}
        if steer.has_bounds:
            effect |= {"low": steer.low, "high": steer.high}
    elif isinstance(steer, ConditionSteer):
        tests = ("threshold", "similarity", "side", "tokens")
        effect |= {name: getattr(steer, name) for name in tests}
    digest = hashlib.sha256(json.dumps(effect, sort_keys=True).encode())
    for name, tensor in sorted(steer.tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        for piece in pieces(tensor):
            digest.update(piece.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
