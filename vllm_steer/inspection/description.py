"""The description of a steer in plain data: kind, site, norms, spectra, accuracies, recipe."""

from collections.abc import Mapping
from typing import Any

from vllm_steer.inspection.spectrum import spectrum
from vllm_steer.steers import DeltaSteer, LMSteer, LowRankSteer, SAESteer, Steer, VectorSteer
from vllm_steer.steers.layers import format_layers
from vllm_steer.steers.properties import LayeredSteer, layer_norms, properties

Description = Mapping[str, Any]
_ACCURACIES = ("train_accuracy", "validation_accuracy")


def describe(steer: Steer) -> Description:
    """Describe a steer in JSON values; norms are those of the stored tensors.

    An ``lm_steer`` has ``columns`` with norm (of ``W = P1 P2^T``, without epsilon), a flag for
    fixed columns and, for ``multiply``, the singular values with their shares of the sum of
    squares. A ``vector`` has ``layers`` with norm and, if the file has them, score and probe
    accuracies (a layer that was probed and not kept has no norm). A ``delta`` has ``layers`` with
    the norm at each step, a ``low_rank`` with the Frobenius norm of ``B A`` and the norm of
    ``B bias``, an ``sae`` with the norms of decoder (``norm``) and encoder, bias and threshold, a
    ``condition`` with the norm of its vector.
    """
    facts = {
        "kind": steer.kind,
        "site": steer.site,
        "hidden_size": steer.hidden_size,
        "default_strength": steer.default_strength,
        "base_model": steer.base_model,
        "description": steer.description,
    }
    if isinstance(steer, LMSteer):
        facts |= {"variant": steer.variant, "epsilon": steer.epsilon, "rank": steer.rank}
        parts = {"columns": [_column(steer, column) for column in range(steer.columns)]}
    else:
        facts |= {**properties(steer), "layer_range": format_layers(steer.layers)}
        parts = {"layers": _layers(steer)}
    return {**facts, **parts, "recipe": None if steer.recipe is None else dict(steer.recipe)}


def _column(steer: LMSteer, column: int) -> dict[str, Any]:
    fields = {"column": column, "fixed": column in steer.fixed_columns}
    if steer.variant != "multiply":
        (vectors,) = steer.tensors.values()
        return {**fields, "norm": float(vectors[column].double().norm())}
    decomposition = spectrum(steer, column)
    return {
        **fields,
        "norm": decomposition.norm,
        "singular_values": decomposition.values.tolist(),
        "shares": decomposition.shares.tolist(),
    }


def _layers(steer: LayeredSteer) -> list[dict[str, Any]]:
    if isinstance(steer, VectorSteer):
        return _vector_layers(steer)
    if isinstance(steer, DeltaSteer):
        return _delta_layers(steer)
    figures = {"norm": layer_norms(steer)}
    if isinstance(steer, LowRankSteer) and steer.bias is not None:
        changes = steer.b.double() @ steer.bias.double()[:, :, None]
        figures["bias_norm"] = changes.norm(dim=(1, 2))
    if isinstance(steer, SAESteer):
        figures["encoder_norm"] = steer.encoder.double().norm(dim=1)
        figures |= {"bias": steer.bias, "threshold": steer.threshold}
    columns = {name: values.double().tolist() for name, values in figures.items()}
    return [
        {"layer": layer, **{name: column[row] for name, column in columns.items()}}
        for row, layer in enumerate(steer.layers)
    ]


def _vector_layers(steer: VectorSteer) -> list[dict[str, Any]]:
    """A row for each layer of the steer and, without a norm, for each layer only probed."""
    rows: dict[int, dict[str, Any]] = {}
    norms = steer.vectors.double().norm(dim=1).tolist()
    for row, layer in enumerate(steer.layers):
        rows[layer] = {"layer": layer, "norm": norms[row]}
        if steer.layer_scores is not None:
            rows[layer]["score"] = steer.layer_scores[row]
    for layer, accuracies in _accuracies(steer.recipe).items():
        rows.setdefault(layer, {"layer": layer}).update(accuracies)
    return [rows[layer] for layer in sorted(rows)]


def _delta_layers(steer: DeltaSteer) -> list[dict[str, Any]]:
    norms = steer.delta.double().norm(dim=2).T.tolist()
    return [
        {"layer": layer, "norm": max(steps), "norm_per_step": steps}
        for layer, steps in zip(steer.layers, norms, strict=True)
    ]


def _accuracies(recipe: Mapping[str, Any] | None) -> Mapping[int, dict[str, float]]:
    """Probe accuracies by layer from the recipe of a fit.

    A recipe is untrusted: anything but lists of layers and numbers is ignored.
    """
    figures = (recipe or {}).get("figures")
    layers = figures.get("read_layers") if isinstance(figures, Mapping) else None
    if not isinstance(figures, Mapping) or not isinstance(layers, list):
        return {}
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        return {}
    accuracies = {
        name: values
        for name in _ACCURACIES
        if isinstance(values := figures.get(name), list) and len(values) == len(layers)
    }
    return {
        layer: {name: v[i] for name, v in accuracies.items() if isinstance(v[i], int | float)}
        for i, layer in enumerate(layers)
    }
