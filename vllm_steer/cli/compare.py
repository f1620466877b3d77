"""``vllm-steer compare``: fixed, scheduled and dynamic strengths for several properties at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_steer.cli import generation_options as options
from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say, say_json

if TYPE_CHECKING:
    from vllm_steer.evaluation.composition.report import ComparisonReport


def compare(
    context: typer.Context,
    model: options.Model,
    properties: Annotated[
        Path,
        typer.Argument(metavar="PROPERTIES", help=".yaml of properties, steers and strengths."),
    ],
    prompts: options.Prompts,
    out: options.Out,
    prompt_field: options.PromptField = "prompt",
    first: options.First = None,
    choose_prompts: Annotated[
        Path | None, typer.Option(help="Prompts to select strengths on (default: --prompts).")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Accuracy that may be given up for a lower perplexity.")
    ] = 0.02,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Judge of all texts, as for eval; may be repeated (default: perplexity by MODEL, "
            "diversity)."
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
    restart: options.Restart = False,
    plot: options.Plot = True,
    as_json: options.AsJson = False,
    dtype: options.Dtype = "auto",
    max_model_len: options.MaxModelLen = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    enforce_eager: options.EnforceEager = False,
) -> None:
    """Compare no steer, fixed, scheduled and dynamic strengths for properties and combinations.

    Strengths are selected on the seen combinations and applied to the unseen ones.
    """
    from vllm_steer.evaluation.composition.comparison_run import compare as run_comparison
    from vllm_steer.evaluation.composition.settings import ComparisonSettings
    from vllm_steer.evaluation.judges import make_judges
    from vllm_steer.evaluation.prompts import read_prompts
    from vllm_steer.optional import require_package
    from vllm_steer.run_folder import locked

    if plot:
        require_package("matplotlib")  # fail before the generation
    selection_prompts = None
    if choose_prompts is not None:
        selection_prompts = read_prompts(choose_prompts, field=prompt_field)
    settings = ComparisonSettings(
        model=model,
        file=properties,
        prompts=read_prompts(prompts, field=prompt_field, count=first),
        selection_prompts=selection_prompts,
        folder=out,
        judges=tuple(judge or ()),
        sampling=options.sampling(context.params),
        tolerance=tolerance,
        engine=options.engine_options(context.params),
        restart=restart,
    )
    with locked(out):
        report = run_comparison(settings, make_judges, progress)
        _show(report, out, plot=plot, as_json=as_json)
    say(str(report.timings), stderr=True)


def _show(report: "ComparisonReport", out: Path, *, plot: bool, as_json: bool) -> None:
    from vllm_steer.evaluation.composition.plot import draw_prices, draw_strengths
    from vllm_steer.evaluation.composition.report import notes, tables
    from vllm_steer.evaluation.json_files import finite

    if plot:
        draw_strengths(report, out / "strengths.png")
        draw_prices(report, out / "report.png")
    for note in notes(report):
        say(f"missing: {note}", stderr=True)
    if as_json:
        say_json(finite(report.data))
        return
    console = Console()
    for table in tables(report):
        console.print(table)
    files = ["report.json", "report.md", "strengths.json"]
    say(f"{out}: {', '.join([*files, 'report.png', 'strengths.png'] if plot else files)}")
