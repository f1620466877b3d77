"""In-context learning prompts: demonstrations followed by a question, from inputs and outputs.

Consecutive rows form groups of ``demonstrations + 1``; an incomplete last group is dropped. The
last row of a group is the question, the rows before it are demonstrations:

    {instruction}
    Q:{input}
    A:{output}

    Q:{input}
    A:

Without demonstrations the prompt is the question alone, without instruction. The authors' loop
omits the last demonstration of a group, so their ``icl_examples`` of 4 is 3 here; their tokens have
a beginning-of-text token before every piece, and here only what the tokenizer adds to a text.

Source: Scalena et al., "Multi-property Steering of Large Language Models with Dynamic Activation
Composition", BlackboxNLP 2024 (arXiv 2406.17563), section 3.1 and the authors' extraction script.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_steer.errors import SteerError
from vllm_steer.texts import read_rows, take, text_of


class Example(NamedTuple):
    """An input and its output."""

    input: str
    output: str


def read_examples(
    path: str | Path, *, input_field: str = "input", output_field: str = "output"
) -> list[Example]:
    """Read the examples of a file, one per row. Raises ``SteerError`` with each invalid row."""
    return list(
        take(
            read_rows(path),
            lambda row: Example(text_of(row, input_field), text_of(row, output_field)),
        )
    )


def icl_prompts(
    examples: Sequence[Example], demonstrations: int, *, instruction: str = ""
) -> list[str]:
    """One prompt for each complete group of examples.

    Raises ``SteerError`` for fewer examples than one group, and for an instruction without
    demonstrations.
    """
    if demonstrations < 0 or (instruction and not demonstrations):
        raise SteerError(
            f"demonstrations is {demonstrations}; expected 0 or more, and 1 or more with an "
            "instruction"
        )
    size = demonstrations + 1
    if len(examples) < size:
        raise SteerError(
            f"the file has {len(examples)} rows; a prompt with {demonstrations} demonstrations "
            f"needs {size}; give more rows, or fewer demonstrations"
        )
    starts = range(0, len(examples) - size + 1, size)
    return [_prompt(examples[start : start + size], instruction) for start in starts]


def support(
    positive: Sequence[str], negative: Sequence[str], count: int, seed: int
) -> tuple[list[str], list[str]]:
    """Draw ``count`` prompts of each set with replacement, at the same indices in both.

    Indices beyond the end of the shorter set are never drawn.
    """
    rng = random.Random(seed)
    last = min(len(positive), len(negative)) - 1
    indices = [rng.randint(0, last) for _ in range(count)]
    return [positive[index] for index in indices], [negative[index] for index in indices]


def _prompt(group: Sequence[Example], instruction: str) -> str:
    *solved, question = group
    opening = f"{instruction}\n" if instruction else ""
    demonstrations = [f"Q:{example.input}\nA:{example.output}\n\n" for example in solved]
    return opening + "".join(demonstrations) + f"Q:{question.input}\nA:"
