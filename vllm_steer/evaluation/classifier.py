"""Text classification models as judges of sentiment, toxicity, formality and the like.

For each prompt ``x``, with ``p(g)`` the probability of the target label for its continuation ``g``:

    share        mean over prompts of the share of texts whose most probable label is the target
    std          standard deviation of that share over the prompts
    probability  mean over prompts of the mean p(g)
    max          mean over prompts of max(0, max_g p(g)), the "expected maximum"
    any          share of the prompts with at least one p(g) > 0.5

Sources: share and std: the sentiment judge of Han et al., ACL 2024 (arXiv 2305.12798);
max and any: Gehman et al., 2020 (arXiv 2009.11462), as Han et al. use them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from vllm_steer.errors import SteerError, cause
from vllm_steer.evaluation.answers import Answers, OnText, ignore_count
from vllm_steer.evaluation.means import by_prompt, mean, spread

_BATCH: Final = 32
_THRESHOLD: Final = 0.5
_EMPTY_TEXT: Final = "\n"  # some tokenizers give no token for ""


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
        """Whether each label is an independent binary decision (sigmoid) and not one of several
        (softmax).
        """
        config = self.model.config
        return bool(config.problem_type == "multi_label_classification" or config.num_labels == 1)


@dataclass(frozen=True)
class ClassifierJudge:
    """Figures of one label; the module's docstring defines them.

    With ``continuation`` False the classifier reads prompt and continuation, as in the authors'
    sentiment judge; with True it reads the continuation alone, as in their toxicity judge. The
    model moves to ``device`` (None: a GPU if there is one) at its first use.
    """

    name: str
    classifier: Classifier
    label: int
    continuation: bool = False
    device: str | None = None
    effect: str = "share"

    def scores(self, answers: Sequence[Answers]) -> dict[str, float]:
        """``share``, ``std``, ``probability``, ``max`` and ``any``; NaN without prompts."""
        return self.figures(self.observe(answers))

    def observe(
        self, answers: Sequence[Answers], on_text: OnText = ignore_count
    ) -> list[list[tuple[float, float]]]:
        """The target probability and the 0/1 verdict of each text, by prompt."""
        label_probabilities = self._probabilities(answers, on_text)
        probability = label_probabilities[:, self.label].tolist()
        verdicts = self._has_label(label_probabilities).tolist()
        return by_prompt(zip(probability, verdicts, strict=True), answers)

    def figures(self, observations: Sequence[Sequence[tuple[float, float]]]) -> dict[str, float]:
        """``figures`` of this module."""
        return figures(
            [[probability for probability, _ in texts] for texts in observations],
            [[verdict for _, verdict in texts] for texts in observations],
        )

    def verdicts(self, answers: Sequence[Answers]) -> list[list[float | None]]:
        """1.0 if the target label is the most probable (if independent: above 0.5), else 0.0."""
        values: list[float | None] = self._has_label(self._probabilities(answers)).tolist()
        return by_prompt(values, answers)

    def _probabilities(
        self, answers: Sequence[Answers], on_text: OnText = ignore_count
    ) -> torch.Tensor:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier.model.to(device)
        return probabilities(
            self.classifier, [text for answer in answers for text in self._inputs(answer)], on_text
        )

    def _inputs(self, answer: Answers) -> list[str]:
        before = "" if self.continuation else answer.prompt
        return [(before + text) or _EMPTY_TEXT for text in answer.texts]

    def _has_label(self, label_probabilities: torch.Tensor) -> torch.Tensor:
        if self.classifier.independent:
            return (label_probabilities[:, self.label] > _THRESHOLD).double()
        return (label_probabilities.argmax(-1) == self.label).double()


def figures(
    probability: Sequence[Sequence[float]], verdicts: Sequence[Sequence[float]]
) -> dict[str, float]:
    """The figures, from target probabilities and 0/1 verdicts, both by prompt and text."""
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
def probabilities(
    classifier: Classifier, texts: Sequence[str], on_text: OnText = ignore_count
) -> torch.Tensor:
    """Label probabilities ``[texts, labels]``, float64, on the CPU: softmax, or sigmoid if
    independent.

    Texts longer than the model's maximum are truncated at their end. ``on_text`` receives the
    number of texts done.
    """
    tokenizer, model = classifier.tokenizer, classifier.model
    longest = min(
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", tokenizer.model_max_length),
    )
    # Without a padding token the model cannot find the end of a padded text.
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
        on_text(min(start + step, len(texts)))
    return torch.cat(batches)


def label_index(classifier: Classifier, label: str) -> int:
    """The index of a label among the model's outputs; an empty label means 1, or 0 with a single
    label.

    Raises ``SteerError`` for an unknown label and for a regression model.
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
    """Load a classifier from a folder or the hub; ``SteerError`` if it is not a classifier."""
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
