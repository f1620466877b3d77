"""Step times on a pretrained model: steered over unsteered, and the authors' forms beside.

    python -m benchmarks.real_model.speed --data DIR --json OUT

One engine serves batches of greedy requests, interleaved with unsteered ones (A/B/A): an LM-Steer
of rank 1000 (the paper's), the French delta in all layers, a vector in all layers, and dynamic
strengths. In the same run, on Hugging Face: the LM-Steer as the authors compute it, and the
authors' loop for Dynamic Activation Composition, which reads the whole text again for each token.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch

from benchmarks import arguments
from benchmarks.decode import BenchmarkEngine, step_columns
from benchmarks.dummy_model import random_lm_steer, steer_config
from benchmarks.dynamic.figures import DynamicBench, cost
from benchmarks.dynamic.served import DynamicModel
from benchmarks.engines import make_engine, set_environment
from benchmarks.peers.hf_engine import HuggingFaceEngine
from benchmarks.peers.hf_lm_steer import HuggingFaceSteeredHead, change_per_row
from benchmarks.real_model.experiment import language_model, parser, steer_file
from benchmarks.real_model.french import fit_french
from benchmarks.real_model.tables import real_model
from benchmarks.result import Result
from benchmarks.rounds import interleave, median

RANK: Final = 1000
STEPS: Final = 16
STEERS: Final = {
    "LM-Steer, rank 1000": "lm:5",
    "vector, all layers": "vector:1",
    "delta, all layers": "delta:1",
}
AUTHORS_LM: Final = "LM-Steer, the authors' form on Hugging Face"
AUTHORS_LOOP: Final = {"fixed": 1, "dynamic": 3}
"""Forward passes for a token, of the authors' loop for a delta."""
Line = dict[str, Any]


def main() -> None:
    """Measure, write, print."""
    set_environment()
    options = parser(__doc__, "speed")
    options.add_argument("--rows", type=arguments.numbers, default=[1, 8], metavar="N,N,...")
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    result = Result("real_model_speed", args.json, model=Path(args.model).name, steps_per_leg=STEPS)
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = write_steers(args.model, args.data, args.folder)
    llm = make_engine(
        args.model,
        steer_config(paths, RANK),
        max_num_seqs=3 * max(args.rows),
        enable_prefix_caching=True,
    )
    for rows in args.rows:
        for line in (
            *steps(llm, args.model, paths, rows, args.rounds),
            *dynamic(llm, args.model, paths, rows, args.rounds),
            *authors_loop(args.model, paths, rows),
        ):
            result.add(line, f"{line['what']}, {rows} rows: {line.get('ratio_median', '-')}")
    result.write(threads=torch.get_num_threads())
    print(real_model(result.data))


def write_steers(model: str, data: Path, folder: Path) -> dict[str, Path]:
    """A random LM-Steer and a random vector, whose values cost as much as fitted ones, and the
    fitted delta.
    """
    from vllm_steer import VectorSteer, save_steer

    paths = {
        name: (folder / f"{name}.safetensors").absolute() for name in ("lm", "vector", "delta")
    }
    config = language_model(model).model.config
    generator = torch.Generator().manual_seed(1)
    save_steer(random_lm_steer(config.hidden_size, RANK, 1e-3, generator), paths["lm"])
    layers = config.num_hidden_layers
    vectors = torch.randn(layers, config.hidden_size, generator=generator)
    save_steer(
        VectorSteer(vectors=vectors, layers=tuple(range(layers)), site="resid", mode="add"),
        paths["vector"],
    )
    if not paths["delta"].exists():
        save_steer(fit_french(model, data / "dac"), paths["delta"])
    return paths


def steps(llm: Any, model: str, paths: dict[str, Path], rows: int, rounds: int) -> Iterator[Line]:
    """A decode step under each steer over one without, and the authors' LM-Steer beside."""
    ours, vocab = BenchmarkEngine(llm), language_model(model).model.config.vocab_size

    def leg(engine: Any, steer: str | None) -> Any:
        return partial(engine.leg, [steer] * rows, STEPS, vocab)

    steered = {name: leg(ours, steer) for name, steer in STEERS.items()}
    for name, measured in interleave(leg(ours, None), steered, rounds).items():
        yield {"what": name, "rows": rows, **step_columns(measured)}
    peer_model = language_model(model).model
    head = HuggingFaceSteeredHead(peer_model.get_output_embeddings(), steer_file(paths["lm"]))
    head.change = change_per_row
    peer_model.set_output_embeddings(head)
    try:
        peer = HuggingFaceEngine(peer_model, lambda steer: head.set_values(5.0 if steer else 0.0))
        within = interleave(leg(peer, None), {"": leg(peer, "lm:5")}, rounds)[""]
        across = interleave(leg(ours, "lm:5"), {"": leg(peer, "lm:5")}, rounds)[""]
    finally:
        peer_model.set_output_embeddings(head.head)
    line = {"what": AUTHORS_LM, "rows": rows, **step_columns(within)}
    yield line | {"over_ours": median([pair.ratio(lambda leg: leg.step_ms) for pair in across])}


def dynamic(llm: Any, model: str, paths: dict[str, Path], rows: int, rounds: int) -> Iterator[Line]:
    """The time of a token under a dynamic strength over an unsteered one."""
    vocab = language_model(model).model.config.vocab_size
    served = DynamicModel(Path(model), steer_config(paths, RANK), vocab)
    bench = DynamicBench(Path(model).name, llm, served, tokens=STEPS, rounds=rounds)
    for line in cost(bench, rows):
        if line["what"] != "delta fixed":
            yield {
                "what": line["what"],
                "rows": rows,
                "unsteered_ms": line["a_ms"],
                "steered_ms": line["b_ms"],
                "ratio_median": line["ratio"],
                "ratio_p20": line["ratio_p20"],
                "ratio_p80": line["ratio_p80"],
                "rounds": line["rounds"],
            }


def authors_loop(model: str, paths: dict[str, Path], rows: int) -> Iterator[Line]:
    """The time of a token where each pass reads the whole text, one request after the other.

    In float32: with several tokens PyTorch is five times slower in bfloat16 on this CPU.
    """
    language = language_model(model, "float32")
    steers = {"delta": steer_file(paths["delta"])}
    prompt = language.tokenizer("Q:What is the capital of France?\nA:")["input_ids"]
    for kind, passes in AUTHORS_LOOP.items():
        times = [one_token(language.model, prompt, steers, step, passes) for step in range(STEPS)]
        yield {
            "what": f"delta {kind}, the authors' loop on Hugging Face, float32",
            "rows": rows,
            "steered_ms": round(1e3 * rows * statistics.median(times), 3),
        }


@torch.inference_mode()
def one_token(model: Any, prompt: list[int], steers: Any, step: int, passes: int) -> float:
    """Seconds of one token of one request: ``passes`` passes over prompt and ``step`` tokens."""
    from vllm_steer import hf

    tokens = torch.tensor([[*prompt, *[prompt[-1]] * step]])
    strengths = {"delta": {"strength": [1.0] * (step + 1)}}
    start = perf_counter()
    for _ in range(passes):
        with hf.steered(model, strengths, steers, prompt_length=len(prompt)):
            model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits.argmax(-1).item()
    return perf_counter() - start


if __name__ == "__main__":
    main()
