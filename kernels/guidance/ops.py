"""Activation guidance as one function over plain tensors."""

from collections.abc import Callable

import torch

from vllm_steer.kernels.guidance.operands import Directions, TokenMap

NO_DIRECTION = -1


@torch.no_grad()
def steer_tokens(
    hidden: torch.Tensor,
    vectors: torch.Tensor,
    direction_of_token: torch.Tensor,
    strength: torch.Tensor,
    *,
    rotate: bool | torch.Tensor = False,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Add steering vectors to the tokens of one layer, each token with its own strengths.

    With ``x = hidden + residual`` and ``d = direction_of_token``::

        change[t] = sum_k strength[t, k] * vectors[d[t, k]]
        out[t] = hidden[t] + change[t]                               if no direction of t rotates
        out[t] = (x + change) * |x| / |x + change| - residual[t]     otherwise

    The first line is activation addition (Turner et al., 2023, arXiv 2308.10248); the second keeps
    the norm, as concept guidance does (von Ruette et al., ICML 2024, arXiv 2402.14433, section 3).
    Its strengths are meant for unit vectors.

    Args:
        hidden: ``[T, width]`` in float32, float16 or bfloat16; any strides. ``T`` may be 0.
        vectors: ``[D, width]``, one direction per row.
        direction_of_token: ``[T]`` or ``[T, K]``, integers: rows of ``vectors``, -1 for none.
        strength: The shape of ``direction_of_token``. A strength of 0 changes nothing.
        rotate: Whether directions rotate: one bool for all, or ``[D]`` bools.
        residual: ``[T, width]``, where the model keeps part of the residual stream in a second
            tensor, as vLLM's layers do; only a rotation reads it.
        backend: ``auto`` (Triton on CUDA, PyTorch elsewhere), ``triton``, ``torch``, or
            ``reference`` (float64, one token at a time).

    Returns:
        A new tensor ``[T, width]`` in ``hidden``'s dtype, on its device; computed in float32 and
        rounded once. A token without a direction keeps its value. Values are finite if those of
        ``x`` and ``x + change`` fit the dtype.

    Devices: all tensors are moved to the device of ``hidden``. Nothing waits for the device, except
    for the check of the indices; a server calls ``map_tokens`` and ``steer_tokens_`` of a backend,
    which have no check and no copy.

    Determinism: a token's result depends on that token alone, bit for bit, on every backend.

    Autograd: no gradient flows through this function.

    Raises:
        ValueError: Shapes that do not fit, or an index that is no direction.
        KernelError: A backend that is not available here (a ``ValueError``).

    Example:
        >>> hidden = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
        >>> vectors = torch.tensor([[1.0, 0.0]])
        >>> which, strength = torch.tensor([-1, 0, 0]), torch.tensor([0.0, 2.0, -3.0])
        >>> steer_tokens(hidden, vectors, which, strength)
        tensor([[3., 4.],
                [5., 4.],
                [0., 4.]])
        >>> steer_tokens(hidden, vectors, which, strength, rotate=True)[2]  # the norm stays 5
        tensor([0., 5.])
    """
    _check_shapes(hidden, vectors, direction_of_token, strength, residual)
    device, num_tokens = hidden.device, hidden.shape[0]
    which = _columns(direction_of_token.to(device))
    strengths = _columns(strength.to(device, torch.float32))
    is_rotation = _rotations(rotate, vectors, device)
    # Row 0 of a table is zero and stands for no direction.
    table = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors]).to(device, torch.float32)
    directions = Directions(table[None].contiguous(), is_rotation)
    token_map = TokenMap(
        directions=(which + 1).T.to(torch.int32).contiguous(),
        strengths=torch.where(which < 0, 0.0, strengths).T[None].contiguous(),
    )
    out = hidden.clone()
    other = None if residual is None else residual.to(device)
    if which.shape[1] and num_tokens:
        steer_tokens_ = _in_place(backend, device)
        steer_tokens_(out, other, directions, 0, token_map, which.shape[1])
    return out


def _columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor[:, None]


def _in_place(name: str, device: torch.device) -> Callable[..., None]:
    if name == "reference":
        from vllm_steer.kernels.guidance import reference

        return reference.steer_tokens_
    from vllm_steer.kernels.dispatch import guidance_backend

    return guidance_backend(name, device).steer_tokens_


def _rotations(
    rotate: bool | torch.Tensor, vectors: torch.Tensor, device: torch.device
) -> torch.Tensor | None:
    """``[D + 1]`` float32 with row 0 for no direction; None if nothing rotates."""
    if isinstance(rotate, bool):
        if not rotate:
            return None
        rotate = torch.ones(vectors.shape[0], dtype=torch.bool)
    if rotate.shape != vectors.shape[:1]:
        raise ValueError(
            f"rotate has shape {list(rotate.shape)}; expected a bool or [{vectors.shape[0]}]"
        )
    return torch.cat([torch.zeros(1, device=device), rotate.to(device, torch.float32)])


def _check_shapes(
    hidden: torch.Tensor,
    vectors: torch.Tensor,
    direction_of_token: torch.Tensor,
    strength: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; expected [tokens, width]")
    if vectors.dim() != 2 or vectors.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"vectors has shape {list(vectors.shape)}; expected [directions, {hidden.shape[1]}]"
        )
    if residual is not None and residual.shape != hidden.shape:
        raise ValueError(
            f"residual has shape {list(residual.shape)}; expected {list(hidden.shape)}"
        )
    num_tokens, shape = hidden.shape[0], direction_of_token.shape
    if shape != strength.shape or shape[:1] != (num_tokens,) or len(shape) > 2:
        raise ValueError(
            f"direction_of_token has shape {list(shape)} and strength {list(strength.shape)}; "
            f"expected [{num_tokens}] or [{num_tokens}, K] for both"
        )
    if direction_of_token.is_floating_point():
        raise ValueError(
            f"direction_of_token has dtype {direction_of_token.dtype}; expected integers"
        )
    if direction_of_token.numel():
        first, last = (int(bound) for bound in direction_of_token.aminmax())
        if first < NO_DIRECTION or last >= vectors.shape[0]:
            raise ValueError(
                f"direction_of_token has values from {first} to {last}; expected -1 (none) or one "
                f"of {vectors.shape[0]} directions"
            )
