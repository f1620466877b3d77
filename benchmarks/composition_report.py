"""Two and three properties at once on the embedded model: dynamic and fixed strengths.

    python -m benchmarks.composition_report --json OUT [--samples 200] [--folder FOLDER]

``vllm-steer compare`` with ``composition/properties.yaml``: strengths are chosen on
``choosing.txt`` and reported on ``prompts.txt``. The embedded LM-Steers are first written with
``RAISED`` times their epsilon, since a dynamic strength is in nats and their unit is small.

``rows`` has a line for each combination and method; ``tried`` has every choice for the pair of
language and sentiment, on the prompts of the selection.
"""

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import arguments
from benchmarks.engines import set_environment
from benchmarks.result import Result

GIVEN = Path(__file__).parent / "composition"
RAISED = 8
PAIR = "fr+cheer"
Line = dict[str, Any]


def main() -> None:
    """Compare, write, print."""
    set_environment()
    parser = arguments.parser(__doc__)
    parser.add_argument("--samples", type=int, default=200, help="texts per prompt")
    parser.add_argument("--folder", type=Path, help="of the run, to keep its texts and go on")
    args = parser.parse_args()
    settings = {"dtype": "float32", "max_tokens": 30, "samples": args.samples, "raised": RAISED}
    result = Result("composition", args.json, **settings)
    with tempfile.TemporaryDirectory(prefix="composition-") as folder:
        report = compare(Path(folder), args.folder or Path(folder) / "run", args.samples)
        result.data |= {"chosen": report.data["chosen"], "tried": list(tried(report))}
        for line in lines(report):
            result.add(line)
    result.show()


def compare(folder: Path, run: Path, samples: int) -> Any:
    """The report of ``vllm-steer compare``, on steers whose unit suits nats."""
    from vllm_steer.cli.progress import progress
    from vllm_steer.embedded import STEERS
    from vllm_steer.evaluation.composition import comparison_run
    from vllm_steer.evaluation.generation import EngineOptions
    from vllm_steer.evaluation.judges import make_judges
    from vllm_steer.evaluation.prompts import read_prompts
    from vllm_steer.evaluation.sampling import Sampling
    from vllm_steer.files import load_steer, save_steer

    shutil.copy(STEERS / "french-delta.safetensors", folder)
    for path in (STEERS / "sentiment.safetensors", STEERS / "formality.safetensors"):
        shipped: Any = load_steer(path)
        raised = load_steer(path, epsilon=RAISED * shipped.epsilon)
        save_steer(raised, folder / f"{path.stem}-x{RAISED}.safetensors")
    shutil.copy(GIVEN / "properties.yaml", folder)
    settings = comparison_run.ComparisonSettings(
        model="embedded",
        file=folder / "properties.yaml",
        prompts=read_prompts(GIVEN / "prompts.txt"),
        selection_prompts=read_prompts(GIVEN / "choosing.txt"),
        folder=run,
        sampling=Sampling(samples=samples, max_tokens=30),
        engine=EngineOptions(dtype="float32", enforce_eager=True),
    )
    return comparison_run.compare(settings, make_judges, progress)


def tried(report: Any) -> Iterator[Line]:
    """The choices that were tried for ``PAIR``."""
    for candidate in report.data["choosing"]:
        if candidate["combination"] == PAIR:
            row = {"method": candidate["method"], "strengths": in_words(candidate["steer"])}
            yield row | {"all": candidate["accuracy"], "perplexity": candidate["perplexity"]}


def lines(report: Any) -> Iterator[Line]:
    """A line per combination and method, with standard errors over the seeds.

    Text ``k`` of every prompt has the same seed, and the headings are so similar that their texts
    are often equal. The texts of one seed are therefore one observation, not one per prompt.
    ``beside`` is the share minus that of the best fixed strengths on the same prompts; for an
    unseen combination, minus that of the reused fixed strengths.
    """
    from vllm_steer.evaluation.composition.property_judges import PropertyJudges, property_judges

    judges = PropertyJudges(report.spec, property_judges(report.spec))
    for combination in report.spec.combinations:
        shares = {}
        for setting in report.of(combination):
            name = setting.row.candidate.name
            texts = zip(*judges.has_all(combination, name, setting.answers), strict=True)
            shares[setting.row.title] = [statistics.fmean(of_seed) for of_seed in texts]
        other = shares.get("best fixed", shares.get("fixed"))
        for setting in report.of(combination):
            own_shares = shares[setting.row.title]
            beside, error = mean_and_error([a - b for a, b in zip(own_shares, other, strict=True)])
            figures = {name: of for judge in setting.judges.values() for name, of in judge.items()}
            yield {
                "combination": "+".join(combination),
                "seen": setting.row.seen,
                "method": setting.row.title,
                "strengths": in_words(dict(setting.row.candidate.steer)),
                "all": setting.accuracy.share,
                "all_error": mean_and_error(own_shares)[1],
                "beside": beside,
                "beside_error": error,
                "shares": {name: item.share for name, item in setting.shares.items()},
                "perplexity": figures["total_perplexity"],
                "median": figures["median"],
                "dist_2": figures["dist-2"],
            }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def in_words(steer: dict[str, Any]) -> str:
    """Strengths in the format of the table: ``fr 1.25, cheer to 0.75 (top-p 0.5)``."""
    parts = []
    for name, dose in steer.items():
        if dose["strength"] == "dynamic":
            parts.append(f"{name} to {dose['max']:g} (top-p {dose['top_p']:g})")
        else:
            parts.append(f"{name} {dose['strength']:g}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
