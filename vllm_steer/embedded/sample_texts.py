"""Writes labelled reviews to a file: `python -m vllm_steer.embedded.sample_texts FILE [OPTIONS]`.

Each line of the JSONL file has a text with its language, sentiment and formality: example data for
the embedded model, on which every command can be tried.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Final

from vllm_steer.embedded import corpus

LABELS: Final = {
    "language": corpus.LANGUAGES,
    "sentiment": corpus.SENTIMENTS,
    "formality": corpus.FORMALITIES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="JSONL file to write")
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=2_000_003)
    for label, known in LABELS.items():
        parser.add_argument(f"--{label}", choices=known, help="only texts of this one")
    arguments = parser.parse_args()
    fixed = {label: getattr(arguments, label) for label in LABELS}
    samples = corpus.generate(arguments.count, seed=arguments.seed, **fixed)
    lines = [json.dumps(dataclasses.asdict(s), ensure_ascii=False) + "\n" for s in samples]
    arguments.file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
