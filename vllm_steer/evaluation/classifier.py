"""Text classification models as judges: sentiment, toxicity, formality and others.

For each prompt ``x`` and its continuations ``g``, ``p(g)`` the probability of the wanted label:

    share        mean over prompts of the share of texts whose likeliest label is the wanted one
    std          the standard deviation of that share over the prompts
    probability  mean over prompts of the mean p(g)
    max          mean over prompts of max_g p(g), beginning at 0: "expected maximum"
    any          share of the prompts with at least one p(g) > 0.5

Sources: share and std: the sentiment judge of Han et al., ACL 2024 (arXiv 2305.12798);
max and any: Gehman et al., 2020 (arXiv 2009.11462), as Han et al. take them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeVar

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.evaluation.answers import Answers
from vllm_steer.evaluation.means import mean, spread

T = TypeVar("T")
_BATCH: Final = 32
_THRESHOLD: Final = 0.5
_EMPTY_TEXT: Final = "\n"  # what an empty text is given as: some tokenizers make no token of ""


@dataclass(frozen=True)
class Classifier:
    """A classification model in evaluation mode, on the CPU, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def labels(self) -> list[str]:
        """The labels in the order of the model's outputs."""
        names = self.model.config.id2label
        return [names[index] for index in range(self.model.config.num_labels)]

    @property
    def independent(self) -> bool:
        """Whether each label is a question of its own, answered by a sigmoid."""
        config = self.model.config
        return bool(config.problem_type == "multi_label_classification" or config.num_labels == 1)


@dataclass(frozen=True)
class ClassifierJudge:
    """Figures of one label, see the module.

    ``continuation`` False shows the classifier prompt and continuation, as the authors' sentiment
    judge does; True the continuation alone, as their toxicity judge does. The model is moved to
    ``device`` (None: a GPU where there is one) when it is first asked.
    """

    name: str
    classifier: Classifier
    label: int
    continuation: bool = False
    device: str | None = None
    effect: str = "share"

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """``share``, ``std``, ``probability``, ``max``, ``any``; NaN where there is no prompt."""
        label_probabilities = self._probabilities(answers)
        return figures(
            _by_prompt(label_probabilities[:, self.label].tolist(), answers),
            _by_prompt(self._has_label(label_probabilities).tolist(), answers),
        )

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """1.0 where the wanted label is the likeliest (an independent one above 0.5), else 0.0."""
        values: list[float | None] = self._has_label(self._probabilities(answers)).tolist()
        return _by_prompt(values, answers)

    def _probabilities(self, answers: Sequence[Answers]) -> torch.Tensor:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier.model.to(device)
        return probabilities(
            self.classifier, [text for answer in answers for text in self._inputs(answer)]
        )

    def _inputs(self, answer: Answers) -> list[str]:
        before = "" if self.continuation else answer.prompt
        return [(before + text) or _EMPTY_TEXT for text in answer.texts]

    def _has_label(self, label_probabilities: torch.Tensor) -> torch.Tensor:
        if self.classifier.independent:
            return (label_probabilities[:, self.label] > _THRESHOLD).double()
        return (label_probabilities.argmax(-1) == self.label).double()


def _by_prompt(values: Iterable[T], answers: Sequence[Answers]) -> list[list[T]]:
    """One value a text, in lists of each prompt's texts."""
    remaining = iter(values)
    return [list(islice(remaining, len(answer.texts))) for answer in answers]


def figures(
    probability: Sequence[Sequence[float]], verdicts: Sequence[Sequence[float]]
) -> dict[str, float]:
    """The figures from each prompt's probabilities and its 1 or 0 for the wanted label."""
    shares = [mean(values) for values in verdicts]
    highest = [max([0.0, *values]) for values in probability]
    return {
        "share": mean(shares),
        "std": spread(shares),
        "probability": mean(map(mean, probability)),
        "max": mean(highest),
        "any": mean(float(value > _THRESHOLD) for value in highest),
    }


@torch.no_grad()
def probabilities(classifier: Classifier, texts: Sequence[str]) -> torch.Tensor:
    """``[texts, labels]``, float64, on the CPU: softmax, or a sigmoid for independent labels.

    Texts longer than the model reads are cut at their end.
    """
    tokenizer, model = classifier.tokenizer, classifier.model
    longest = min(
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", tokenizer.model_max_length),
    )
    # A model without a padding token cannot tell where a padded text ends.
    step = _BATCH if model.config.pad_token_id is not None and tokenizer.pad_token else 1
    batches = [torch.empty(0, model.config.num_labels, dtype=torch.float64)]
    for start in range(0, len(texts), step):
        encoded = tokenizer(
            list(texts[start : start + step]),
            truncation=True,
            max_length=longest,
            padding=step > 1,
            return_tensors="pt",
        )
        logits = model(**encoded.to(model.device)).logits.double().cpu()
        batches.append(logits.sigmoid() if classifier.independent else logits.softmax(-1))
    return torch.cat(batches)


def label_index(classifier: Classifier, label: str) -> int:
    """SteerRole output a label is; an empty one is output 1, or 0 of a model with one label.

    Raises ``SteerError`` for a label that the model does not have, and a model of no labels.
    """
    if classifier.model.config.problem_type == "regression":
        raise SteerError(f"model {classifier.name} has no labels: it is a regression model")
    labels = classifier.labels
    if not label:
        return min(1, len(labels) - 1)
    if label not in labels:
        raise SteerError(
            f"model {classifier.name} has no label {label!r}; its labels: {', '.join(labels)}"
        )
    return labels.index(label)


def load_classifier(name: str) -> Classifier:
    """A folder or a hub id. Raises ``SteerError`` if there is no such classification model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, output_loading_info=True
        )
    except (OSError, ValueError, AttributeError, KeyError, ImportError) as error:
        raise SteerError(f"model {name}: cannot be loaded ({cause(error)})") from error
    if report["missing_keys"]:
        raise SteerError(
            f"model {name} is not a text classifier: its checkpoint lacks "
            f"{', '.join(sorted(report['missing_keys'])[:3])}; name a sequence classification model"
        )
    return Classifier(name, model.eval().requires_grad_(False), tokenizer)
