"""``vllm-steer sweep``: the best layers and strength of a steer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_steer.cli import generation_options as options
from vllm_steer.cli.output import check_output
from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.errors import SteerError

if TYPE_CHECKING:
    from vllm_steer.sweep.search import Point
    from vllm_steer.sweep.sweep_run import Search, SweepResult


def sweep(
    context: typer.Context,
    model: options.Model,
    steer: options.SteerFile,
    prompts: options.Prompts,
    judge: Annotated[
        str,
        typer.Option(
            help="Judge of the effect: lexicon:FILE, classifier:MODEL:LABEL, language:fr."
        ),
    ],
    perplexity: Annotated[
        str | None, typer.Option(help="Model that scores perplexity (default: MODEL).")
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Maximum ratio of perplexity to the unsteered model's.")
    ] = 1.2,
    search: Annotated[
        str | None, typer.Option(help="grid or bisection (default: grid if strengths are given).")
    ] = None,
    strengths: Annotated[
        str | None, typer.Option(help="Grid: '1,2,5' or first:last:step '1:8:1'.")
    ] = None,
    ends: Annotated[
        str | None, typer.Option("--range", help="Bisection: '0:10' (the default) or '0:-10'.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Bisection: halvings [6].")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to try, such as 'top:1,2,4;all;0-3'.")
    ] = None,
    phase: options.Phase = None,
    low: options.Low = None,
    high: options.High = None,
    when: options.When = None,
    condition: options.Conditions = None,
    direction: Annotated[str, typer.Option(help="up or down: raise or lower the effect.")] = "up",
    write: Annotated[
        bool, typer.Option("--write", help="Write the result into the steer file.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot of the points.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the PNG if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all points as JSON.")] = False,
    prompt_field: options.PromptField = "prompt",
    first: options.First = None,
    preset: options.Preset = None,
    samples: options.Samples = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    max_model_len: options.MaxModelLen = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            help="vLLM's share; judges need the rest [on a GPU: 0.6; on a CPU: "
            "VLLM_CPU_KVCACHE_SPACE GiB, or 2 GiB]."
        ),
    ] = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    enforce_eager: options.EnforceEager = False,
) -> None:
    """Find the strongest effect within a budget of perplexity, over strengths and layers.

    Exit code 1 if no strength within the budget changes the effect; the file is then unchanged.
    """
    from vllm_steer.evaluation.judges import make_judge
    from vllm_steer.evaluation.prompts import read_prompts
    from vllm_steer.optional import require_package
    from vllm_steer.sweep.search import DIRECTIONS
    from vllm_steer.sweep.sweep_run import SweepSettings, check_writable
    from vllm_steer.sweep.sweep_run import sweep as run_sweep

    if plot is not None:
        require_package("matplotlib")
        read_by_judges = (spec.rpartition(":")[2] for spec in (judge, perplexity or ""))
        check_output(plot, force, inputs=[steer, prompts, *read_by_judges])
    if write:
        check_writable(steer)
    directions = [allowed for allowed in DIRECTIONS if allowed == direction]
    if not directions:
        raise SteerError(f"direction is {direction!r}; allowed: {', '.join(DIRECTIONS)}")
    settings = SweepSettings(
        model=model,
        steer=steer,
        prompts=read_prompts(prompts, field=prompt_field, count=first),
        judge=judge,
        perplexity=f"perplexity:{perplexity or model}",
        budget=budget,
        search=_search(search, strengths, ends, rounds),
        layers=layers,
        direction=directions[0],
        options=options.dose_options(context.params, without=("layers",)),
        conditions=options.condition_files(condition),
        sampling=options.sampling(context.params),
        engine=options.engine_options(context.params),
    )
    with progress("starting vLLM") as advance:
        result = run_sweep(
            settings,
            make_judge,
            lambda done, total, description: advance(done, total=total, description=description),
        )
    say(str(result.timings), stderr=True)
    _finish(result, write=write, plot=plot, as_json=as_json)


def _search(
    search: str | None, strengths: str | None, ends: str | None, rounds: int | None
) -> "Search":
    from vllm_steer.evaluation.strengths import parse_range, parse_strengths
    from vllm_steer.sweep.sweep_run import Search

    kind = search or ("bisection" if strengths is None else "grid")
    if kind not in ("grid", "bisection"):
        raise SteerError(f"search is {kind!r}; allowed: grid, bisection")
    if kind == "grid":
        if strengths is None or ends is not None or rounds is not None:
            raise SteerError("a grid takes strengths such as '1:8:1', and no range and no rounds")
        grid = parse_strengths(strengths)
        if not any(grid):
            raise SteerError(f"strengths are {strengths!r}; a grid needs one other than 0")
        return Search(strengths=grid)
    if strengths is not None:
        raise SteerError("a bisection takes a range such as '0:10', and no strengths")
    return Search(
        ends=Search.ends if ends is None else parse_range(ends),
        rounds=Search.rounds if rounds is None else rounds,
    )


def _finish(result: "SweepResult", *, write: bool, plot: Path | None, as_json: bool) -> None:
    """Select a point, write it, show all points, and only then raise the error of the selection."""
    from vllm_steer.sweep.report import draw

    best, output, problem = _select_and_write(result, write)
    _show(result, best, output, as_json=as_json)
    if plot is not None:
        draw(result, best, plot)
    if problem is not None:
        raise problem


def _select_and_write(
    result: "SweepResult", write: bool
) -> "tuple[Point | None, Path | None, SteerError | None]":
    """The selected point, the file it was written to, and the error if either is missing."""
    from vllm_steer.sweep.sweep_run import write_choice

    best = None
    try:
        best = result.choose()
        if write:
            write_choice(result, best)
    except SteerError as error:  # the points took long to measure; show them first
        return best, None, error
    return best, result.settings.steer if write else None, None


def _show(
    result: "SweepResult", best: "Point | None", output: Path | None, *, as_json: bool
) -> None:
    from vllm_steer.evaluation.json_files import finite
    from vllm_steer.sweep import report

    if as_json:
        say_json(finite(report.data(result, best, output)))
        return
    Console().print(report.table(result, best))
    if output is not None and best is not None:
        has_layer_candidates = result.settings.layers is not None
        layers = f", layers {best.candidate.name}" if has_layer_candidates else ""
        say(f"{output}: default strength {best.strength:.5g}{layers}")
