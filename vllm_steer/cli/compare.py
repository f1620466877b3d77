"""``vllm-steer eval`` of a file of properties: fixed, scheduled and dynamic strengths compared."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from vllm_steer.cli import generating_options as options
from vllm_steer.cli.fit.guidance_options import refuse
from vllm_steer.cli.progress import progress
from vllm_steer.cli.terminal import Console, say, say_json
from vllm_steer.run_folder import locked

if TYPE_CHECKING:
    from vllm_steer.evaluation.composition.report import ComparisonReport

PROPERTIES: Final = "With a .yaml of properties"
PROPERTY_SUFFIXES: Final = (".yaml", ".yml")
_OF_ONE_STEER: Final = ("strengths", "layers", "phase", "schedule", "control_seed")


def compare_properties(context: typer.Context) -> None:
    """Run the command whose options ``context`` holds."""
    refuse(context, _OF_ONE_STEER, "beside a .yaml of properties, which says it of each")
    from vllm_steer.evaluation.composition.comparing import compare
    from vllm_steer.evaluation.composition.comparison import Comparison
    from vllm_steer.evaluation.judges import make_judges
    from vllm_steer.evaluation.prompts import read_prompts
    from vllm_steer.optional import need

    given = context.params
    if given["plot"]:
        need("matplotlib")  # now, not after hours of generating
    field, choosing = given["prompt_field"], given["choose_prompts"]
    asked = Comparison(
        model=given["model"],
        file=given["steer"],
        prompts=read_prompts(given["prompts"], field=field, count=given["first"]),
        choosing=None if choosing is None else read_prompts(choosing, field=field),
        folder=given["out"],
        judges=tuple(given["judge"] or ()),
        sampling=options.sampling(given),
        tolerance=given["tolerance"],
        engine=options.engine_options(given),
        restart=given["restart"],
    )
    with locked(asked.folder):
        report = compare(asked, make_judges, progress)
        _show(report, asked.folder, given["plot"], given["as_json"])


def _show(report: "ComparisonReport", out: Path, plot: bool, as_json: bool) -> None:
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
