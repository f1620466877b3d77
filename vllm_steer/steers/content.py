"""A digest of what a steer does: equal for equal content, whatever the file's name."""

import hashlib
import json

import torch

from vllm_steer.steers import DeltaSteer, Steer, VectorSteer
from vllm_steer.steers.checks import pieces


def content_digest(steer: Steer) -> str:
    """SHA-256 over the steer's tensors and over all that decides how they act.

    Names, descriptions, the file's dtype and what a request chooses itself (strength, layers,
    phase, schedule) do not enter.
    """
    acts: dict[str, object] = {"kind": steer.kind, "site": steer.site, "layers": steer.layers}
    if isinstance(steer, VectorSteer):
        acts |= {"mode": steer.mode}
    elif not isinstance(steer, DeltaSteer):
        acts |= {"epsilon": steer.epsilon, "fixed_columns": steer.fixed_columns}
    digest = hashlib.sha256(json.dumps(acts, sort_keys=True).encode())
    for name, tensor in sorted(steer.tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        for piece in pieces(tensor):
            digest.update(piece.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
