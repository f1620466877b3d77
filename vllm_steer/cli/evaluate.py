"""``vllm-steer eval``: what a steer does at each strength, beside no steer and a random one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_steer.cli.progress import progress

if TYPE_CHECKING:
    from vllm_steer.evaluation.report import Report

_GENERATING = "Generating"
_VLLM = "vLLM"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or 'embedded'.")],
    steer: Annotated[Path, typer.Argument(metavar="STEER", help="Steer file of any known tool.")],
    strengths: Annotated[
        str, typer.Option(help="'-5,-2,2,5' or first:last:step '-5:5:2.5'; 0 is always in it.")
    ],
    prompts: Annotated[Path, typer.Option(help="Prompts: .jsonl, .json, .csv, .tsv or .txt.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a killed run goes on there.")],
    prompt_field: Annotated[str, typer.Option(help="Name of the prompt in a row.")] = "prompt",
    first: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many prompts.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="perplexity:MODEL, diversity, repetition, classifier:MODEL:LABEL, language:fr, "
            "lexicon:FILE; again for more. Without: perplexity by MODEL, diversity, repetition."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="lm-steer: its authors' settings.", rich_help_panel=_GENERATING),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Texts per prompt [25].", rich_help_panel=_GENERATING)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens at most [20].", rich_help_panel=_GENERATING)
    ] = None,
    exact_length: Annotated[
        bool | None,
        typer.Option(help="Write all of them: no early end.", rich_help_panel=_GENERATING),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy [1].", rich_help_panel=_GENERATING)
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="[1]", rich_help_panel=_GENERATING)] = None,
    top_k: Annotated[
        int | None, typer.Option(help="0 for all [50].", rich_help_panel=_GENERATING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the first text [0].", rich_help_panel=_GENERATING)
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Some of the steer's layers: '8-31', '3,7,9'.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help="all, prompt or generation.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Of a delta: fixed, start or dim; without: the file's.")
    ] = None,
    control_seed: Annotated[int, typer.Option(help="Of the random steer.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the folder's run.")] = False,
    plot: Annotated[bool, typer.Option(help="Draw report.png.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    dtype: Annotated[str, typer.Option(rich_help_panel=_VLLM)] = "auto",
    max_model_len: Annotated[int | None, typer.Option(rich_help_panel=_VLLM)] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(rich_help_panel=_VLLM)] = None,
    tensor_parallel_size: Annotated[int, typer.Option(rich_help_panel=_VLLM)] = 1,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", rich_help_panel=_VLLM)] = False,
) -> None:
    """Generate at each strength in vLLM, and judge the texts: JSON, tables and a plot.

    Beside the steer stand the unsteered model and a random steer of equal norm, always.
    """
    from vllm_steer.evaluation.evaluating import Evaluation
    from vllm_steer.evaluation.evaluating import evaluate as run_evaluation
    from vllm_steer.evaluation.generating import EngineOptions
    from vllm_steer.evaluation.judges import make_judges
    from vllm_steer.evaluation.optional import need
    from vllm_steer.evaluation.prompts import read_prompts
    from vllm_steer.evaluation.sampling import sampling_of
    from vllm_steer.evaluation.strengths import parse_strengths

    if plot:
        need("matplotlib")  # now, not after hours of generating
    given = {
        "samples": samples,
        "max_tokens": max_tokens,
        "exact_length": exact_length,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    options: dict[str, Any] = {"layers": layers, "phase": phase, "schedule": schedule}
    asked = Evaluation(
        model=model,
        steer=steer,
        prompts=read_prompts(prompts, field=prompt_field, count=first),
        strengths=parse_strengths(strengths),
        folder=out,
        judges=tuple(judge or ()),
        sampling=sampling_of(preset, given),
        options={name: value for name, value in options.items() if value is not None},
        control_seed=control_seed,
        engine=EngineOptions(
            dtype, max_model_len, gpu_memory_utilization, tensor_parallel_size, enforce_eager
        ),
        restart=restart,
    )
    report = run_evaluation(asked, make_judges, progress)
    _show(report, out, plot=plot, as_json=as_json)


def _show(report: "Report", out: Path, *, plot: bool, as_json: bool) -> None:
    from rich.console import Console

    from vllm_steer.evaluation.plot import draw_report
    from vllm_steer.evaluation.report import tables, without_effect
    from vllm_steer.evaluation.scoring import as_json as json_text

    if plot:
        draw_report(report, out / "report.png")
    for name, reason in report.missing.items():
        print(f"not at hand: {name}: {reason}", file=sys.stderr)
    for reason in without_effect(report):
        print(f"not normalised: {reason}", file=sys.stderr)
    if as_json:
        print(json_text(report.data))
        return
    console = Console()
    for table in tables(report):
        console.print(table)
    print(f"{out}: report.json, report.md{', report.png' if plot else ''}")
