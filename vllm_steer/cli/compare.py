"""``vllm-steer compare``: several properties at once, by fixed, scheduled and dynamic strengths."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_steer.cli import generating_options as options
from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.run_folder import locked

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
        Path | None, typer.Option(help="Prompts to choose strengths on; without: --prompts.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Share below the highest that is given up for perplexity.")
    ] = 0.02,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the texts as a whole, as for eval; again for more. Without: perplexity by "
            "MODEL, diversity."
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

    Strengths are chosen on the combinations that are seen and taken over for the unseen ones.
    """
    from vllm_steer.evaluation.composition.comparing import compare as run_comparison
    from vllm_steer.evaluation.composition.comparison import Comparison
    from vllm_steer.evaluation.judges import make_judges
    from vllm_steer.evaluation.prompts import read_prompts
    from vllm_steer.optional import require_package

    if plot:
        require_package("matplotlib")  # now, not after hours of generating
    choosing = None
    if choose_prompts is not None:
        choosing = read_prompts(choose_prompts, field=prompt_field)
    asked = Comparison(
        model=model,
        file=properties,
        prompts=read_prompts(prompts, field=prompt_field, count=first),
        choosing=choosing,
        folder=out,
        judges=tuple(judge or ()),
        sampling=options.sampling(context.params),
        tolerance=tolerance,
        engine=options.engine_options(context.params),
        restart=restart,
    )
    with locked(out):
        report = run_comparison(asked, make_judges, progress)
        _show(report, out, plot=plot, as_json=as_json)


def _show(report: "ComparisonReport", out: Path, *, plot: bool, as_json: bool) -> None:
    from vllm_steer.evaluation.composition.plot import draw_prices, draw_strengths
    from vllm_steer.evaluation.composition.report import notes, tables
    from vllm_steer.evaluation.json_files import finite

    if plot:
        draw_strengths(report, out / "strengths.png")
        draw_prices(report, out / "report.png")
    for note in notes(report):
        say(f"not there: {note}", stderr=True)
    if as_json:
        say_json(finite(report.data))
        return
    console = Console()
    for table in tables(report):
        console.print(table)
    files = ["report.json", "report.md", "strengths.json"]
    say(f"{out}: {', '.join([*files, 'report.png', 'strengths.png'] if plot else files)}")
