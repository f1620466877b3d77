"""Prompts with demonstrations, from rows of inputs and outputs.

Rows are taken in groups of ``demonstrations + 1``, as they follow each other; a last, smaller group
is left out. The last row of a group is asked for, those before it are shown with their outputs:

    {instruction}
    Q:{input}
    A:{output}

    Q:{input}
    A:

Without demonstrations the prompt is the question alone, and there is no instruction. The authors'
loop leaves the last demonstration of a group out, so that their ``icl_examples`` of 4 are 3 here;
their tokens have a beginning-of-text token before every piece, and these only what the tokenizer
puts before a text.

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
    """What is asked and what is answered."""

    input: str
    output: str


def read_examples(
    path: str | Path, *, input_field: str = "input", output_field: str = "output"
) -> list[Example]:
    """The examples of a file, one a row; ``SteerError`` names each bad row."""
    return list(
        take(
            read_rows(path),
            lambda row: Example(text_of(row, input_field), text_of(row, output_field)),
        )
    )


def icl_prompts(
    examples: Sequence[Example], demonstrations: int, *, instruction: str = ""
) -> list[str]:
    """One prompt for each whole group of examples.

    Raises ``SteerError`` for fewer examples than one group, and for an instruction where there are
    no demonstrations for it to stand before.
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
    """``count`` prompts of each side, drawn with replacement: the same places on both sides.

    Where one side has more prompts, those beyond the other's last are never drawn.
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
