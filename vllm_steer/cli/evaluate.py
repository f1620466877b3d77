"""``vllm-steer eval``: the effect of a steer at each strength, with two controls."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_steer.cli import generation_options as options
from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.errors import SteerError

if TYPE_CHECKING:
    from vllm_steer.evaluation.report import EvaluationReport


def _no_properties(steer: Path) -> Path:
    if steer.suffix in (".yaml", ".yml"):
        raise SteerError(
            f"{steer}: this is not a steer file; for a file of properties use vllm-steer compare"
        )
    return steer


def evaluate(
    context: typer.Context,
    model: options.Model,
    steer: Annotated[
        Path,
        typer.Argument(
            metavar="STEER", help="Steer file in any supported format.", callback=_no_properties
        ),
    ],
    prompts: options.Prompts,
    out: options.Out,
    strengths: Annotated[
        str, typer.Option(help="'-5,-2,2,5' or first:last:step '-5:5:2.5'; 0 is always added.")
    ],
    prompt_field: options.PromptField = "prompt",
    first: options.First = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="perplexity:MODEL, diversity, repetition, classifier:MODEL:LABEL, language:fr, "
            "lexicon:FILE; may be repeated (default: perplexity by MODEL, diversity, repetition)."
        ),
    ] = None,
    preset: options.Preset = None,
    samples: options.Samples = None,
    max_tokens: options.MaxTokens = None,
    exact_length: options.ExactLength = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    layers: Annotated[
        str | None, typer.Option(help="Some of the steer's layers: '8-31', '3,7,9'.")
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="all, prompt, generation, text, answer or last.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Schedule of a step delta: fixed, start or dim.")
    ] = None,
    low: options.Low = None,
    high: options.High = None,
    when: options.When = None,
    condition: options.Conditions = None,
    control_seed: Annotated[int, typer.Option(help="Seed of the random steer.")] = 0,
    restart: options.Restart = False,
    plot: options.Plot = True,
    as_json: options.AsJson = False,
    dtype: options.Dtype = "auto",
    max_model_len: options.MaxModelLen = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    enforce_eager: options.EnforceEager = False,
) -> None:
    """Generate at each strength in vLLM, and judge the texts: JSON, tables and a plot.

    The unsteered model and a random steer of equal norm are always evaluated as controls.
    """
    from vllm_steer.evaluation.evaluation_run import EvaluationSettings
    from vllm_steer.evaluation.evaluation_run import evaluate as run_evaluation
    from vllm_steer.evaluation.judges import make_judges
    from vllm_steer.evaluation.prompts import read_prompts
    from vllm_steer.evaluation.strengths import parse_strengths
    from vllm_steer.optional import require_package
    from vllm_steer.run_folder import locked

    if plot:
        require_package("matplotlib")  # fail before the generation
    settings = EvaluationSettings(
        model=model,
        steer=steer,
        prompts=read_prompts(prompts, field=prompt_field, count=first),
        strengths=parse_strengths(strengths),
        folder=out,
        judges=tuple(judge or ()),
        sampling=options.sampling(context.params),
        options=options.dose_options(context.params),
        conditions=options.condition_files(condition),
        control_seed=control_seed,
        engine=options.engine_options(context.params),
        restart=restart,
    )
    with locked(out):
        report = run_evaluation(settings, make_judges, progress)
        _show(report, out, plot=plot, as_json=as_json)
    say(str(report.timings), stderr=True)


def _show(report: "EvaluationReport", out: Path, *, plot: bool, as_json: bool) -> None:
    from vllm_steer.evaluation.json_files import finite
    from vllm_steer.evaluation.plot import draw_report
    from vllm_steer.evaluation.report import tables, without_effect

    if plot:
        draw_report(report, out / "report.png")
    for name, reason in report.missing.items():
        say(f"not available: {name}: {reason}", stderr=True)
    for reason in without_effect(report):
        say(f"not normalised: {reason}", stderr=True)
    if as_json:
        say_json(finite(report.data))
        return
    console = Console()
    for table in tables(report):
        console.print(table)
    say(f"{out}: report.json, report.md{', report.png' if plot else ''}")
