"""Greedy answers of engines in one process: stock vLLM, and under configs that steer by default.

    python benchmarks/serving/offline_answers.py ASKED.json ANSWERS.json

``ASKED`` has the ``model`` folder, the engines' ``options``, the ``prompts`` (token ids),
``max_tokens`` and ``configs`` by name. ``ANSWERS`` gets, as lists of [tokens, logprobs], ``stock``
and for every config its name (requests that do not ask) and ``NAME, none`` (requests that ask for
no steer). The stock engine is made before the plugin is registered.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

Answers = list[tuple[list[int], list[float]]]


def main() -> None:
    """Make all the engines, for the end of one would end what they share, and ask each."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_STEER_DISABLE"] = "1"
    asked = json.loads(Path(sys.argv[1]).read_text())
    engines = {"stock": engine(asked, None)}
    os.environ["VLLM_STEER_DISABLE"] = "0"
    from vllm_steer.plugin import register

    register()
    engines |= {name: engine(asked, config) for name, config in asked["configs"].items()}
    found = {name: answers(llm, asked, None) for name, llm in engines.items()}
    for name in asked["configs"]:
        found[f"{name}, none"] = answers(engines[name], asked, {"steer": "none"})
    Path(sys.argv[2]).write_text(json.dumps(found))


def engine(asked: dict[str, Any], config: dict[str, Any] | None) -> Any:
    """An engine in this process, with a steer config or without."""
    from vllm import LLM

    additional = {} if config is None else {"steer": config}
    return LLM(asked["model"], **asked["options"], additional_config=additional)


def answers(llm: Any, asked: dict[str, Any], extra_args: dict[str, Any] | None) -> Answers:
    """Tokens and log probabilities, each prompt alone in its batch."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=asked["max_tokens"],
        ignore_eos=True,
        logprobs=1,
        extra_args=extra_args,
    )
    rows = []
    for prompt in asked["prompts"]:
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        tokens, logprobs = output.outputs[0].token_ids, output.outputs[0].logprobs
        chosen = [at[token].logprob for token, at in zip(tokens, logprobs, strict=True)]
        rows.append((list(tokens), chosen))
    return rows


if __name__ == "__main__":
    main()
