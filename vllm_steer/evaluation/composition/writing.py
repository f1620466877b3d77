"""The texts of candidates, by vLLM, into the run's folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vllm_steer.evaluation.composition.asked import Combination, Composition
from vllm_steer.evaluation.composition.candidates import Candidate, Part
from vllm_steer.evaluation.composition.dppl import Example
from vllm_steer.evaluation.evaluating import Advance, Progress
from vllm_steer.evaluation.generating import EngineOptions, engine
from vllm_steer.evaluation.prompts import Prompts
from vllm_steer.evaluation.run import Run
from vllm_steer.evaluation.sampling import Sampling


@dataclass(frozen=True)
class Writer:
    """Writes what is missing; an engine is started for it, and is gone afterwards.

    Candidates of the part ``examples`` are written greedily after the examples' plain prompts, one
    text each: it is their strengths that are wanted.
    """

    model: str
    asked: Composition
    prompts: Prompts
    choosing: Prompts
    examples: Mapping[Combination, Sequence[Example]]
    sampling: Sampling
    engine: EngineOptions
    run: Run
    progress: Progress

    def write(self, wanted: Sequence[Candidate]) -> None:
        """Generate the texts that are not there yet."""
        missing = self.run.missing(list({each.name: each for each in wanted}.values()))
        if not missing:
            return
        sizes = [len(self._prompts(each)) * self._sampling(each.part).samples for each in missing]
        files = {name: each.steer.resolve() for name, each in self.asked.properties.items()}
        done = 0
        with (
            self.progress("starting vLLM", sum(sizes)) as advance,
            engine(self.model, files, self.engine) as running,
        ):
            for each, size in zip(missing, sizes, strict=True):
                advance(done, said=f"writing {each.name}")
                answers = running.generate(
                    self._prompts(each),
                    self._sampling(each.part),
                    each.steer or None,
                    on_text=partial(_count, advance, done),
                )
                self.run.write(each, answers)
                done += size

    def _prompts(self, each: Candidate) -> tuple[str, ...]:
        if each.part == "examples":
            return tuple(example.plain for example in self.examples[each.combination])
        return (self.choosing if each.part == "choosing" else self.prompts).texts

    def _sampling(self, part: Part) -> Sampling:
        if part != "examples":
            return self.sampling
        tokens = self.sampling.max_tokens
        return Sampling(samples=1, max_tokens=tokens, temperature=0, top_k=0)


def _count(advance: Advance, before: int, texts: int) -> None:
    advance(before + texts)
