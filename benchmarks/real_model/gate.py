"""Steers behind conditions: which requests are steered, as an engine serves them.

    python -m benchmarks.real_model.gate --data DIR --json OUT

Two gates. The first one's condition is that a prompt is French, and its steer holds the answer at
the mean of English; prompts are openings of French and of English answers to the same questions.
The second one's condition is that a review is negative, and its steer holds the continuation on the
side of French; prompts are sentences of SST-5. Each condition is fitted by ``fit condition``, with
two similarities, on the prompt's last token and on any.

Every held-out prompt is asked greedily in one batch: unsteered, always steered, and steered behind
each condition. A request was steered if its tokens are those of the always steered one and not
those of the unsteered one, and was not if it is the other way round; where both are the same, or
its tokens are neither, it is not counted. ``expected`` is the verdict in Hugging Face.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.engines import set_environment
from benchmarks.real_model.ablation import ONE
from benchmarks.real_model.experiment import (
    jackknife,
    language_model,
    parser,
    seconds_of,
    steer_file,
    timed,
)
from benchmarks.real_model.gate_figures import TokenIds, figures, outcome
from benchmarks.real_model.language_direction import (
    FIRST_TO_FIT,
    Means,
    fit_means,
    held,
    openings,
    save,
)
from benchmarks.real_model.sentiment import balanced, read_sst
from benchmarks.real_model.served import Doses, Request, kept, serve
from benchmarks.real_model.tables import real_model
from benchmarks.result import Result
from vllm_steer.steers import ConditionSteer, Similarity, Tokens

TO_FIT: Final = 100
HELD_OUT: Final = 40
TOKENS: Final = 20
READERS: Final[tuple[tuple[Similarity, Tokens], ...]] = (
    ("cosine", "last"),
    ("cosine", "any"),
    ("cast", "last"),
    ("cast", "any"),
)
Line = dict[str, Any]


@dataclass(frozen=True)
class Gate:
    """A steer, and prompts on which its condition shall hold and those on which it shall not."""

    name: str
    steer: str
    fitted: tuple[list[str], list[str]]
    held_out: tuple[list[str], list[str]]

    def condition(self, similarity: str, tokens: str) -> str:
        """The name of a condition."""
        return f"{self.name}-{similarity}-{tokens}"

    @property
    def prompts(self) -> list[tuple[str, bool]]:
        """The prompts held out, and whether the condition shall hold."""
        positive, negative = self.held_out
        return [(prompt, True) for prompt in positive] + [(prompt, False) for prompt in negative]

    @property
    def ways(self) -> dict[str, Doses]:
        """How each prompt is asked."""
        gated = {
            name: {self.steer: {"strength": 1, "when": name}}
            for name in (self.condition(*reader) for reader in READERS)
        }
        always = {self.steer: {"strength": 1, "phase": "answer"}}
        return {"unsteered": {}, "always": always, **gated}


def gates(data: Path) -> list[Gate]:
    """Both gates, with their prompts."""
    early, late = range(FIRST_TO_FIT), range(FIRST_TO_FIT, 10**6)
    languages = [
        tuple(openings(data / "dac", name, rows)[:count] for name in ("FRA", "ENG"))
        for rows, count in ((late, TO_FIT), (early, HELD_OUT))
    ]
    sentences = read_sst(data / "sst5" / "train.txt")
    reviews = [
        tuple([one.text for one in part if one.label * sign > 0] for sign in (-1, 1))
        for part in (balanced(sentences.steer, 2 * TO_FIT), balanced(sentences.judge, 2 * HELD_OUT))
    ]
    return [
        Gate(name, steer, (fitted[0], fitted[1]), (asked[0], asked[1]))
        for name, steer, (fitted, asked) in (
            ("french", "to-english", languages),
            ("negative", "to-french", reviews),
        )
    ]


def main() -> None:
    """Fit, serve, compare, write, print."""
    set_environment()
    args = parser(__doc__, "gate").parse_args()
    result = Result(
        "real_model_gate",
        args.json,
        model=Path(args.model).name,
        to_fit=TO_FIT,
        held_out=HELD_OUT,
        max_tokens=TOKENS,
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    made = gates(args.data)
    with timed(args.folder, "fit"):
        paths = fit(args.model, args.data, args.folder, made)
    with timed(args.folder, "serve"):
        answers = served(args.model, args.folder, paths, made)
    for gate, own in zip(made, answers, strict=True):
        for reader in READERS:
            result.add(line_of(args.model, gate, own, paths, *reader))
    effects = [effect for gate, own in zip(made, answers, strict=True) for effect in _of(gate, own)]
    result.write(effects=effects, seconds=seconds_of(args.folder))
    print(real_model(result.data))


def fit(model: str, data: Path, folder: Path, made: Sequence[Gate]) -> dict[str, Path]:
    """The files of the steers and of all conditions, each made once."""
    from vllm_steer import save_steer
    from vllm_steer.cli.progress import progress
    from vllm_steer.fit import fit_condition

    names = ("to-english", "to-french")
    paths = {name: (folder / f"{name}.safetensors").absolute() for name in names}
    if not all(path.exists() for path in paths.values()):
        means = fit_means(model, data / "dac", "resid")
        save(language_steers(means), folder)
    language = language_model(model, "float32")
    for gate in made:
        for similarity, tokens in READERS:
            name = gate.condition(similarity, tokens)
            paths[name] = (folder / f"{name}.safetensors").absolute()
            if paths[name].exists():
                continue
            with progress(f"fitting {name}", None) as advance:
                found = fit_condition(
                    language.model,
                    language.tokenizer,
                    *gate.fitted,
                    layers=range(ONE + 1),
                    similarity=similarity,
                    tokens=tokens,
                    on_prompt=advance,
                )
            save_steer(found.steer, paths[name])
    return paths


def language_steers(means: Means) -> dict[str, Any]:
    """One layer of the answer held at the mean of English, and on the side of French.

    At a mean, and not only on its side, the first one has an effect on English prompts as well,
    which tells whether it acted.
    """
    french, english = (side[ONE] for side in means.positions(means.direction))
    return {
        "to-english": replace(held(means.direction, ONE, french, english), low=english),
        "to-french": held(means.direction, ONE, english, french),
    }


Answers = dict[str, list[tuple[TokenIds, str]]]
"""The tokens and the text of each prompt's answer, by way."""


def served(
    model: str, folder: Path, paths: Mapping[str, Path], made: Sequence[Gate]
) -> list[Answers]:
    """The answers of each gate, all made in one batch, once."""
    from vllm_steer.digest import file_digest

    asked = [
        (number, way, Request(prompt, doses))
        for number, gate in enumerate(made)
        for prompt, _ in gate.prompts
        for way, doses in gate.ways.items()
    ]
    requests = [request for *_, request in asked]

    def make() -> list[Line]:
        return [asdict(answer) for answer in serve(model, paths, requests, TOKENS)]

    facts = {
        "model": model,
        "steers": {name: file_digest(path) for name, path in paths.items()},
        "requests": [asdict(request) for request in requests],
        "max_tokens": TOKENS,
    }
    found: list[Answers] = [{way: [] for way in gate.ways} for gate in made]
    answers = kept(folder / "answers.json", facts, make)
    for (number, way, _), answer in zip(asked, answers, strict=True):
        found[number][way].append((tuple(answer["tokens"]), answer["text"]))
    return found


def line_of(
    model: str,
    gate: Gate,
    answers: Answers,
    paths: Mapping[str, Path],
    similarity: str,
    tokens: str,
) -> Line:
    """A line of the result: one condition of a gate."""
    name = gate.condition(similarity, tokens)
    condition = steer_file(paths[name])
    expected = verdicts(model, condition, [prompt for prompt, _ in gate.prompts])
    rows = [
        outcome(is_positive, verdict, unsteered, always, gated)
        for (_, is_positive), verdict, (unsteered, _), (always, _), (gated, _) in zip(
            gate.prompts,
            expected,
            answers["unsteered"],
            answers["always"],
            answers[name],
            strict=True,
        )
    ]
    (layer,) = condition.layers
    return {
        "gate": gate.name,
        "similarity": similarity,
        "tokens": tokens,
        "layer": layer,
        "side": condition.side,
        "threshold": round(condition.threshold, 4),
        **figures(rows),
    }


def verdicts(model: str, condition: ConditionSteer, prompts: Sequence[str]) -> list[bool]:
    """Whether a condition holds on each prompt, in Hugging Face."""
    from vllm_steer.fit.activations import SelectedTokens, read_tokens
    from vllm_steer.hf.conditions import matches

    language = language_model(model, "float32")
    encoded = [language.tokenizer(prompt)["input_ids"] for prompt in prompts]
    selected = [
        SelectedTokens(ids, range(len(ids)) if condition.tokens == "any" else [len(ids) - 1])
        for ids in encoded
    ]
    rows = read_tokens(
        language.model, selected, site=condition.site, layers=condition.layers, batch_size=16
    )
    return [bool(matches(condition, row[:, 0]).any()) for row in rows]


def _of(gate: Gate, answers: Answers) -> Iterator[Line]:
    """The share of French answers by kind of prompt and way, with errors over the prompts."""
    from vllm_steer.evaluation.languages import detect_languages

    for is_positive in (True, False):
        for way in ("unsteered", "always", gate.condition(*READERS[0])):
            texts = [
                text
                for (_, own), (_, text) in zip(gate.prompts, answers[way], strict=True)
                if own is is_positive
            ]
            languages = [next(iter(detect_languages(text)), "") for text in texts]
            shares: Line = {}
            for code in ("fr", "en"):
                value, error = jackknife(languages, partial(_share, code))
                shares |= {code: round(value, 4), f"{code}_error": round(error, 4)}
            yield {
                "gate": gate.name,
                "is_positive": is_positive,
                "way": way,
                **shares,
                "example": texts[0],
            }


def _share(code: str, languages: Sequence[str]) -> float:
    return languages.count(code) / len(languages)


if __name__ == "__main__":
    main()
