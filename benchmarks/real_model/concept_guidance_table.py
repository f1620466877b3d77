"""The tables of ``concept_guidance.py``."""

from collections.abc import Callable

from benchmarks.real_model.sentiment_table import (
    Line,
    cost_table,
    document,
    effect_table,
    lines_of,
    perplexity,
    pnes_table,
    share,
)
from benchmarks.table import grid


def concept_guidance_tables(data: Line) -> str:
    """The tables of a result as Markdown."""
    probes = list(dict.fromkeys(line["probe"] for line in lines_of(data, "probes")))
    by_probe = []
    for probe in probes:
        by_probe += [
            (f"Probe `{probe}`: positive texts in percent:", _of_probe(probe, effect_table)),
            (f"Probe `{probe}`: perplexity and distinct n-grams:", _of_probe(probe, cost_table)),
        ]
    return document(
        data,
        (
            ("Accuracy on held-out answers by layer, and the length of a token:", _accuracy),
            *by_probe,
            ("Effect normalised by perplexity:", _pnes),
            ("Layers, the best by accuracy on held-out answers:", _layers),
        ),
    )


def _of_probe(
    probe: str, make: Callable[[list[Line], str], list[str]]
) -> Callable[[Line], list[str]]:
    def table(data: Line) -> list[str]:
        lines = [line for line in lines_of(data, "probes") if line["probe"] == probe]
        return make(lines, "scale")

    return table


def _accuracy(data: Line) -> list[str]:
    if "accuracy" not in data:
        return []
    validation = [found["validation"] for found in data["accuracy"].values()]
    rows = [
        [str(layer), *(f"{accuracy:.2f}" for accuracy in accuracies), f"{norm:.0f}"]
        for layer, (norm, *accuracies) in enumerate(zip(data["norms"], *validation, strict=True))
    ]
    return grid(["layer", *data["accuracy"], "length"], rows)


def _pnes(data: Line) -> list[str]:
    return pnes_table(data["pnes"], "probe") if "pnes" in data else []


def _layers(data: Line) -> list[str]:
    others = lines_of(data, "layers")
    scales = {line["strength"] for line in others}
    half = [line for line in lines_of(data, "probes") if line["strength"] in scales]
    known = {line["probe"] for line in others}
    lines = [line for line in [*others, *half] if line["probe"] in known]
    steered = [line for line in lines if line["steer"] != "none"]
    steered.sort(key=lambda line: (line["layers"], line["strength"], line["steer"] != "steer"))
    rows = [
        [
            str(line["layers"]),
            f"{line['strength']:g}",
            line["steer"],
            share(line, "vader"),
            share(line, "classifier"),
            perplexity(line),
        ]
        for line in steered
    ]
    heads = ["layers", "scale", "steer", "VADER", "classifier", "perplexity"]
    return grid(heads, rows) if rows else []
