"""French taken out of the answers: a direction is removed, or held on the side of English.

    python -m benchmarks.real_model.ablation --data DIR --json OUT

The direction is the difference of means between French and English answers to the same questions,
at the output of each layer. Prompts to which the unsteered model answers in French are openings of
French answers, and questions after French demonstrations. Every prompt is asked under every setting
in one batch, greedy and sampled. A row has the share of French and of English answers (langdetect),
their perplexity by the unsteered model and their variety, with standard errors over the prompts;
random directions stand beside. The settings were chosen on other questions.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.engines import set_environment
from benchmarks.real_model.experiment import (
    jackknife,
    language_model,
    parser,
    seconds_of,
    timed,
)
from benchmarks.real_model.french import DEMONSTRATIONS, INSTRUCTIONS
from benchmarks.real_model.language_direction import (
    PAIRS,
    Means,
    fit_means,
    held,
    openings,
    removed,
    save,
)
from benchmarks.real_model.served import Doses, Request, kept, serve
from benchmarks.real_model.tables import real_model
from benchmarks.result import Result
from vllm_steer import VectorSteer

PROMPTS: Final = 30
ROWS: Final = range(100, 250)
"""The rows of the data that the prompts are made of; earlier ones served to choose settings."""
TOKENS: Final = 30
LATE: Final = range(12, 18)
ONE: Final = 14
Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A row of the result: what is done, in which layers, with which direction."""

    what: str
    layers: str
    doses: Doses
    direction: str = "French"


def settings(num_layers: int = 18) -> list[Setting]:
    """All settings; ``random`` ones are controls of those before them."""

    def within(name: str, layers: str) -> Doses:
        return {name: {"strength": 1, "layers": layers}}

    last = num_layers - 1
    late, one = f"{LATE.start}-{last}", str(ONE)
    return [
        Setting("unsteered", "-", {}, "-"),
        Setting("removed", f"0-{last}", {"direction": 1}),
        Setting("removed", f"0-{last}", {"random": 1}, "random"),
        Setting("removed, attn_out too", f"0-{last}", {"direction": 1, "attention": 1}),
        Setting("removed", late, within("direction", late)),
        Setting("removed", one, within("direction", one)),
        Setting("removed", one, within("random", one), "random"),
        Setting("removed, centred", late, within("centred", late)),
        Setting("removed, centred", late, within("centred-random", late), "random"),
        Setting("held at English", late, {f"held-{layer}": 1 for layer in LATE}),
        Setting("held at English", late, {f"held-random-{layer}": 1 for layer in LATE}, "random"),
        Setting("held at English", one, {f"held-{ONE}": 1}),
    ]


def steers_of(resid: Means, attention: Means) -> dict[str, VectorSteer]:
    """The steers by the names in the settings."""
    direction = resid.direction
    normal = torch.randn(
        direction.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    steers = {
        "direction": removed(direction),
        "random": removed(normal),
        "attention": removed(attention.direction, "attn_out"),
        "centred": removed(resid.centred(direction)),
        "centred-random": removed(resid.centred(normal)),
    }
    for name, vectors in (("held", direction), ("held-random", normal)):
        french, english = resid.positions(vectors)
        steers |= {
            f"{name}-{layer}": held(vectors, layer, french[layer], english[layer]) for layer in LATE
        }
    return steers


def prompts(data: Path) -> dict[str, list[str]]:
    """The prompts of each kind, as many of one as of the other."""
    from vllm_steer.evaluation.composition.dppl import read_icl

    size = DEMONSTRATIONS + 1
    pairs = read_icl(data / "FRA.json", DEMONSTRATIONS, INSTRUCTIONS["FRA"])
    chosen = pairs[ROWS.start // size : ROWS.stop // size]
    return {
        "openings": openings(data, "FRA", ROWS)[:PROMPTS],
        "demonstrations": [pair.icl for pair in chosen][:PROMPTS],
    }


@dataclass(frozen=True)
class Observation:
    """Measurements of the answers to one prompt: shares of sampled and of greedy ones, their cost
    in nats and tokens by the unsteered model, and distinct pairs of words.
    """

    french: float
    english: float
    greedy_french: float
    nll: float
    tokens: int
    dist_2: float


def perplexity(rows: Sequence[Observation]) -> float:
    """``exp(sum nll / sum tokens)`` over all answers."""
    return math.exp(sum(row.nll for row in rows) / max(1, sum(row.tokens for row in rows)))


def average(name: str, rows: Sequence[Observation]) -> float:
    """The mean of one measurement over the prompts."""
    return statistics.fmean(getattr(row, name) for row in rows)


FIGURES: Final[Mapping[str, Callable[[Sequence[Observation]], float]]] = {
    **{name: partial(average, name) for name in ("french", "english", "greedy_french", "dist_2")},
    "perplexity": perplexity,
}


def figures(setting: Setting, kind: str, rows: Sequence[Observation], example: str) -> Line:
    """A line of the result."""
    line: Line = {
        "prompts": kind,
        "what": setting.what,
        "layers": setting.layers,
        "direction": setting.direction,
    }
    for name, statistic in FIGURES.items():
        value, error = jackknife(rows, statistic)
        line |= {name: round(value, 4), f"{name}_error": round(error, 4)}
    return line | {"example": example}


def main() -> None:
    """Fit, serve, judge, write, print."""
    set_environment()
    options = parser(__doc__, "ablation")
    options.add_argument("--samples", type=int, default=1, help="sampled answers per prompt")
    args = options.parse_args()
    result = Result(
        "real_model_ablation",
        args.json,
        model=Path(args.model).name,
        prompts=PROMPTS,
        samples=args.samples,
        max_tokens=TOKENS,
        pairs=PAIRS,
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    data = args.data / "dac"
    with timed(args.folder, "fit"):
        resid, paths = fit(args.model, data, args.folder)
    with timed(args.folder, "serve"):
        answers = served(args.model, data, args.folder, paths, args.samples)
    with timed(args.folder, "judge"):
        for line in judged(args.model, prompts(data), answers):
            result.add(line)
    french, english = resid.positions(resid.direction)
    cosines = torch.nn.functional.cosine_similarity(resid.direction, resid.common, dim=-1)
    result.write(
        french_mean=[round(value, 1) for value in french],
        english_mean=[round(value, 1) for value in english],
        cosine_with_common=[round(value, 3) for value in cosines.tolist()],
        seconds=seconds_of(args.folder),
    )
    print(real_model(result.data))


def fit(model: str, data: Path, folder: Path) -> tuple[Means, dict[str, Path]]:
    """The means at ``resid``, fitted once, and the files of all steers."""
    path = folder / "means.pt"
    if not path.exists():
        fitted = [fit_means(model, data, site) for site in ("resid", "attn_out")]
        torch.save([[means.french, means.english] for means in fitted], path)
    resid, attention = (Means(*pair) for pair in torch.load(path))
    return resid, save(steers_of(resid, attention), folder)


def served(
    model: str, data: Path, folder: Path, paths: Mapping[str, Path], samples: int
) -> dict[tuple[str, int], list[list[str]]]:
    """The answers by kind of prompt and setting: for each prompt the greedy one, then the others.

    All are made in one batch, once.
    """
    from vllm_steer.digest import file_digest

    seeds = [None, *range(samples)]
    asked = [
        (kind, number, prompt, seed)
        for kind, texts in prompts(data).items()
        for number in range(len(settings()))
        for prompt in texts
        for seed in seeds
    ]
    requests = [
        Request(prompt, settings()[number].doses, seed) for _, number, prompt, seed in asked
    ]

    def make() -> list[str]:
        return [answer.text for answer in serve(model, paths, requests, TOKENS)]

    facts = {
        "model": model,
        "steers": {name: file_digest(path) for name, path in paths.items()},
        "requests": [asdict(request) for request in requests],
        "max_tokens": TOKENS,
    }
    texts = kept(folder / "answers.json", facts, make)
    found: dict[tuple[str, int], list[list[str]]] = {}
    for start in range(0, len(asked), len(seeds)):
        kind, number, *_ = asked[start]
        found.setdefault((kind, number), []).append(texts[start : start + len(seeds)])
    return found


def judged(
    model: str,
    prompts: Mapping[str, Sequence[str]],
    answers: Mapping[tuple[str, int], Sequence[Sequence[str]]],
) -> Iterator[Line]:
    """A line per kind of prompt and setting."""
    for (kind, number), texts in answers.items():
        observed = observations(model, prompts[kind], texts)
        yield figures(settings()[number], kind, observed, texts[0][0])


def observations(
    model: str, prompts: Sequence[str], texts: Sequence[Sequence[str]]
) -> list[Observation]:
    """The measurements of each prompt's answers, the greedy one first."""
    from vllm_steer.evaluation.answers import Answers
    from vllm_steer.evaluation.diversity import DiversityJudge
    from vllm_steer.evaluation.languages import detect_languages
    from vllm_steer.evaluation.perplexity import likelihoods

    sampled = [
        Answers(prompt, tuple(each[1:])) for prompt, each in zip(prompts, texts, strict=True)
    ]
    costs = iter(likelihoods(language_model(model, "float32"), sampled))
    diversity = DiversityJudge("diversity")
    rows = []
    for answer, (greedy, *_) in zip(sampled, texts, strict=True):
        languages = [next(iter(detect_languages(text)), "") for text in answer.texts]
        own = [cost for cost in (next(costs) for _ in answer.texts) if cost.num_tokens]
        rows.append(
            Observation(
                french=languages.count("fr") / len(languages),
                english=languages.count("en") / len(languages),
                greedy_french=float(next(iter(detect_languages(greedy)), "") == "fr"),
                nll=sum(cost.nll for cost in own),
                tokens=sum(cost.num_tokens for cost in own),
                dist_2=diversity.scores([answer])["dist-2"],
            )
        )
    return rows


if __name__ == "__main__":
    main()
