"""The tables of the page about a pretrained model, one function for each experiment's result."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from benchmarks.real_model.ablation_table import ablation_tables
from benchmarks.real_model.concept_guidance_table import concept_guidance_tables
from benchmarks.real_model.gate_table import gate_tables
from benchmarks.real_model.lm_steer_table import lm_steer_tables
from benchmarks.real_model.page import document, pm, table

Line = Mapping[str, Any]


def real_model(data: Mapping[str, Any]) -> str:
    """The tables of a result, with the command and the machine that made it."""
    return MAKERS[data["benchmark"]](data)


def french(data: Mapping[str, Any]) -> str:
    """Share, dPPL, perplexity and variety by setting; what is saved at equal share."""
    icl = data["demonstrations_figures"]
    rows = [
        (
            f"{line['method']} {line['strength']}".replace(" -", ""),
            pm(line, "share"),
            pm(line, "greedy_share"),
            pm(line, "dppl", 1),
            f"{line['median_dppl']:.1f}",
            pm(line, "log_ratio"),
            pm(line, "perplexity", 1),
            pm(line, "dist_2"),
        )
        for line in data["rows"]
    ]
    headings = (
        "strength",
        "French",
        "greedy",
        "dPPL",
        "median",
        "ln ratio",
        "perplexity",
        "dist-2",
    )
    saved = [
        (f"{line['method']} {line['strength']}", pm(line, "dppl", 1), pm(line, "log_ratio"))
        for line in data["saved"]
    ]
    demonstrations = (
        f"After demonstrations in French the model answers in French {icl['share']:.2f} ± "
        f"{icl['share_error']:.2f} of the time, at a perplexity of {icl['perplexity']:.1f}. dPPL "
        f"is over these {icl['french']} answers."
    )
    saved_headings = ("strength", "dPPL saved at equal share", "ln PPL ratio saved")
    tables = table(headings, rows), demonstrations, table(saved_headings, saved)
    return document(data, *tables)


def several_properties(data: Mapping[str, Any]) -> str:
    """All properties at once, by combination and method."""
    rows = [
        (
            line["combination"].replace("+", ", ") + ("" if line["seen"] else " (unseen)"),
            line["method"],
            line["strengths"].replace(" (top-p 0.5)", "") or "-",
            pm(line, "all"),
            "-" if line["method"] == "fixed" else pm(line, "beside"),
            f"{line['perplexity']:.1f}",
        )
        for line in data["rows"]
        if line["method"] != "best fixed"
    ]
    headings = ("properties", "method", "strengths", "all at once", "beside fixed", "perplexity")
    tried = [
        (
            line["combination"].replace("+", ", "),
            line["method"],
            line["strengths"].replace(" (top-p 0.5)", ""),
            f"{line['all']:.2f}",
            f"{line['perplexity']:.1f}",
        )
        for line in sorted(data["tried"], key=lambda line: (line["combination"], line["all"]))
    ]
    caption = f"Tried on the {data['choosing']} questions of the selection:"
    tried_headings = ("properties", "method", "strengths", "all at once", "perplexity")
    return document(data, table(headings, rows), caption, table(tried_headings, tried))


def speed(data: Mapping[str, Any]) -> str:
    """Step and token times."""
    rows = [
        (
            line["what"],
            str(line["rows"]),
            _ms(line.get("unsteered_ms")),
            _ms(line.get("steered_ms")),
            _ratio(line),
        )
        for line in data["rows"]
    ]
    headings = ("steer", "requests", "unsteered ms", "steered ms", "ratio (p20 to p80)")
    return document(data, table(headings, rows))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ratio(line: Line) -> str:
    if "ratio_median" not in line:
        return "-"
    return f"{line['ratio_median']:.2f} ({line['ratio_p20']:.2f} to {line['ratio_p80']:.2f})"


MAKERS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "real_model_french": french,
    "real_model_several_properties": several_properties,
    "real_model_speed": speed,
    "real_model_lm_steer": lm_steer_tables,
    "real_model_concept_guidance": concept_guidance_tables,
    "real_model_ablation": ablation_tables,
    "real_model_gate": gate_tables,
}
