"""``vllm-steer eval``: what a steer does at each strength, beside no steer and a random one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_steer.cli import generating_options as options
from vllm_steer.cli.compare import PROPERTIES, PROPERTY_SUFFIXES, compare_properties
from vllm_steer.cli.fit.guidance_options import refuse
from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.errors import SteerError
from vllm_steer.run_folder import locked

if TYPE_CHECKING:
    from vllm_steer.evaluation.report import Report


def evaluate(
    context: typer.Context,
    model: options.Model,
    steer: Annotated[
        Path,
        typer.Argument(
            metavar="STEER", help="Steer file of any known tool; or a .yaml of properties."
        ),
    ],
    prompts: options.Prompts,
    out: Annotated[Path, typer.Option(help="Folder of the run; a killed run goes on there.")],
    strengths: Annotated[
        str | None,
        typer.Option(
            help="'-5,-2,2,5' or first:last:step '-5:5:2.5'; 0 is always in it.",
            show_default="of a steer file: needed",
        ),
    ] = None,
    prompt_field: options.PromptField = "prompt",
    first: options.First = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="perplexity:MODEL, diversity, repetition, classifier:MODEL:LABEL, language:fr, "
            "lexicon:FILE; again for more. Without: perplexity by MODEL, diversity, repetition."
        ),
    ] = None,
    preset: options.Preset = None,
    samples: options.Samples = None,
    max_tokens: options.MaxTokens = None,
    exact_length: Annotated[
        bool | None,
        typer.Option(help="Write all of them: no early end.", rich_help_panel=options.GENERATING),
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    layers: Annotated[
        str | None, typer.Option(help="Some of the steer's layers: '8-31', '3,7,9'.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help="all, prompt or generation.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Of a delta: fixed, start or dim; without: the file's.")
    ] = None,
    control_seed: Annotated[int, typer.Option(help="Of the random steer.")] = 0,
    choose_prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to choose strengths on; without: --prompts.",
            rich_help_panel=PROPERTIES,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Share below the highest that is given up for perplexity.",
            rich_help_panel=PROPERTIES,
        ),
    ] = 0.02,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the folder's run.")] = False,
    plot: Annotated[bool, typer.Option(help="Draw report.png.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    dtype: options.Dtype = "auto",
    max_model_len: options.MaxModelLen = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(rich_help_panel=options.VLLM)
    ] = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    enforce_eager: options.EnforceEager = False,
) -> None:
    """Generate at each strength in vLLM, and judge the texts: JSON, tables and a plot.

    Beside the steer stand the unsteered model and a random steer of equal norm, always. A .yaml
    of properties compares fixed, scheduled and dynamic strengths of several steers at once.
    """
    if steer.suffix in PROPERTY_SUFFIXES:
        compare_properties(context)
        return
    refuse(
        context,
        ("choose_prompts", "tolerance"),
        f"beside {steer}: it belongs to a .yaml of properties",
    )
    if strengths is None:
        raise SteerError("strengths are missing; give --strengths such as '-5:5:2.5'")
    from vllm_steer.evaluation.evaluating import Evaluation
    from vllm_steer.evaluation.evaluating import evaluate as run_evaluation
    from vllm_steer.evaluation.judges import make_judges
    from vllm_steer.evaluation.prompts import read_prompts
    from vllm_steer.evaluation.strengths import parse_strengths
    from vllm_steer.optional import need

    if plot:
        need("matplotlib")  # now, not after hours of generating
    doses: dict[str, Any] = {"layers": layers, "phase": phase, "schedule": schedule}
    asked = Evaluation(
        model=model,
        steer=steer,
        prompts=read_prompts(prompts, field=prompt_field, count=first),
        strengths=parse_strengths(strengths),
        folder=out,
        judges=tuple(judge or ()),
        sampling=options.sampling(context.params),
        options={name: value for name, value in doses.items() if value is not None},
        control_seed=control_seed,
        engine=options.engine_options(context.params),
        restart=restart,
    )
    with locked(out):
        report = run_evaluation(asked, make_judges, progress)
        _show(report, out, plot=plot, as_json=as_json)


def _show(report: "Report", out: Path, *, plot: bool, as_json: bool) -> None:
    from vllm_steer.evaluation.json_files import finite
    from vllm_steer.evaluation.plot import draw_report
    from vllm_steer.evaluation.report import tables, without_effect

    if plot:
        draw_report(report, out / "report.png")
    for name, reason in report.missing.items():
        say(f"not at hand: {name}: {reason}", stderr=True)
    for reason in without_effect(report):
        say(f"not normalised: {reason}", stderr=True)
    if as_json:
        say_json(finite(report.data))
        return
    console = Console()
    for table in tables(report):
        console.print(table)
    say(f"{out}: report.json, report.md{', report.png' if plot else ''}")
