"""One batch in vLLM, each request with its own steers: ``python docs/examples/steer_a_batch.py``.

The embedded model stands for a model of yours. Its vocabulary is small, so a lexicon can say how
many texts are positive, formal, French or German.
"""

from vllm import LLM, SamplingParams

from vllm_steer import embedded
from vllm_steer.embedded import lexicon

PROMPT = "Hotel Astoria:"
REQUESTS = {
    "no steer": None,
    # LM-Steers act at the input of the LM head. A negative strength steers the opposite way.
    "positive": {"sentiment": 5},
    "negative": {"sentiment": -5},
    # Steering vectors act inside the layers; options choose layers and tokens.
    "French": {"french-vector": 5},
    "formal, last layers": {"formality-vector": {"strength": 3, "layers": "2-3"}},
    # Several steers at once, of several kinds.
    "German and positive": {"german-vector": 3.5, "sentiment": 5},
    # Presets are mixes that the config names; a strength multiplies the whole mix.
    "preset": "french-thanks",
    # A strength that is computed for each token.
    "dynamic": {"french-delta": "dynamic"},
}


def main() -> None:
    """Generate 16 texts per request in one batch and print what share has each property."""
    llm = LLM(
        str(embedded.MODEL),
        additional_config={"steer": str(embedded.STEER_CONFIG)},
        enforce_eager=True,
        max_model_len=256,
        gpu_memory_utilization=0.3,
    )
    params = [
        SamplingParams(
            n=16,
            seed=1,
            temperature=1.0,
            max_tokens=28,
            extra_args={"steer": steer, "steer_strengths": True} if steer else None,
        )
        for steer in REQUESTS.values()
    ]
    outputs = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    print(f"{'request':22}{'positive':>10}{'formal':>10}{'French':>10}{'German':>10}   first text")
    for name, output in zip(REQUESTS, outputs, strict=True):
        texts = [PROMPT + sample.text for sample in output.outputs]
        shares = [
            sum(map(lexicon.sentiment, texts)) / len(texts),
            sum(map(lexicon.formality, texts)) / len(texts),
            sum(lexicon.language(text) == "fr" for text in texts) / len(texts),
            sum(lexicon.language(text) == "de" for text in texts) / len(texts),
        ]
        cells = "".join(f"{share:10.0%}" for share in shares)
        print(f"{name:22}{cells}   {output.outputs[0].text.strip()[:40]}")
    strengths = outputs[-1].outputs[0].steer_strengths["french-delta"]
    print("dynamic strengths of the first text:", *(f"{value:.2f}" for value in strengths[:8]))


if __name__ == "__main__":
    main()
