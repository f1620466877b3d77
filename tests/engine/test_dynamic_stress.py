"""Dynamic strengths with few KV blocks and few slots, and with requests that end early."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from dynamic_outputs import assert_dynamic
from engines import RUNNER, Setting, doses_of, dynamic, engine, greedy, is_dynamic, reporting
from reference import assert_guided, load_reference
from scheduling import (
    leftovers,
    num_objects,
    pooled_strengths,
    preemptions,
    resident_mib,
    scheduler_of,
)

from vllm_steer import embedded, load_steer

pytestmark = pytest.mark.engine

BLOCK = 32
CONFIG = str(embedded.STEER_CONFIG)
# How many requests in all, and after how many memory is at rest; the V2 runner's own kernels are
# interpreted on a CPU.
MANY, SETTLED = (1000, 300) if RUNNER == "v1" else (160, 60)

FRENCH = {"french-delta": dynamic(top_p=0.6)}
TWO = {**FRENCH, "german-delta": dynamic(1.5, top_p=0.8)}
THREE = {**TWO, "formality-vector": dynamic(3.0, top_p=0.9)}
HEAD = {"sentiment": dynamic(5.0, top_p=0.7)}
KINDS: tuple[Setting, ...] = (
    {},
    FRENCH,
    HEAD,
    TWO,
    {"sentiment": 4.0},
    {"formality-shift": dynamic(-2.0, top_p=0.9), "german-delta": 1.0},
    {"french-delta": {"strength": 1.5, "schedule": "dim"}},
    {**FRENCH, **HEAD},
)
REQUESTS: tuple[Setting, ...] = (*KINDS, *KINDS)


@pytest.fixture(scope="module")
def steers() -> dict[str, Any]:
    return {path.stem: load_steer(path) for path in embedded.STEERS.glob("*.safetensors")}


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference(embedded.MODEL)


def texts(count: int, length: int, *, seed: int = 3) -> list[dict[str, list[int]]]:
    """Prompts of random tokens, of about the given length."""
    rng = random.Random(seed)
    return [
        {"prompt_token_ids": [rng.randrange(3, 1500) for _ in range(length - index % 5)]}
        for index in range(count)
    ]


def check(outputs: Any, settings: Sequence[Setting], reference: Any, steers: Any) -> None:
    for output, setting in zip(outputs, settings, strict=True):
        doses = doses_of(setting, steers)
        if is_dynamic(setting):
            assert_dynamic(output, reference, doses, steers)
        else:
            assert_guided(output, reference, doses, steers)


def serve(llm: Any, prompts: Any, settings: Sequence[Setting], **options: Any) -> Any:
    return llm.generate(prompts, reporting(greedy(settings, **options)), use_tqdm=False)


def test_chunked_prefill_and_preemption(reference: Any, steers: Any) -> None:
    options = {
        "max_num_batched_tokens": 48,
        "max_num_seqs": 32,
        "num_gpu_blocks_override": 40,
        "block_size": BLOCK,
    }
    with engine(embedded.MODEL, CONFIG, **options) as llm:
        outputs = serve(llm, texts(16, 70), REQUESTS, max_tokens=40)
        count, resources = preemptions(llm), leftovers(llm)
    assert count > 0
    assert resources == {}
    check(outputs, REQUESTS, reference, steers)


@pytest.mark.matrix
@pytest.mark.parametrize("max_num_seqs", [5, 7])
def test_few_slots_of_max_num_seqs(max_num_seqs: int, reference: Any, steers: Any) -> None:
    with engine(embedded.MODEL, CONFIG, max_num_seqs=max_num_seqs) as llm:
        outputs = serve(llm, texts(16, 12), REQUESTS)
        resources = leftovers(llm)
    assert resources == {}
    check(outputs, REQUESTS, reference, steers)


@pytest.mark.matrix
def test_streams_that_do_not_fit_end_only_their_own_request(reference: Any, steers: Any) -> None:
    settings: list[Setting] = [THREE, {}, FRENCH]
    options = {"num_gpu_blocks_override": 8, "block_size": BLOCK, "max_model_len": 128}
    with engine(embedded.MODEL, CONFIG, **options) as llm:
        outputs = serve(llm, texts(3, 70), settings, max_tokens=40)
        resources = leftovers(llm)
    assert resources == {}
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "length"]
    assert "do not fit into the engine together" in outputs[0].outputs[0].stop_reason
    check(outputs[1:], settings[1:], reference, steers)


@pytest.mark.matrix
def test_without_a_prefix_cache(reference: Any, steers: Any) -> None:
    with engine(embedded.MODEL, CONFIG, enable_prefix_caching=False) as llm:
        outputs = serve(llm, texts(16, 70), REQUESTS)
    check(outputs, REQUESTS, reference, steers)


@pytest.mark.matrix
def test_streams_read_the_prompt_from_the_prefix_cache_and_leave_it_unsteered(
    reference: Any, steers: Any
) -> None:
    (prompt,) = texts(1, 100)
    settings = [{}, FRENCH, TWO, {}, HEAD, {"french-delta": 1.5}, TWO, {}]
    with engine(embedded.MODEL, CONFIG, block_size=BLOCK) as llm:
        outputs = [serve(llm, prompt, [setting], max_tokens=40)[0] for setting in settings]
        longer = [
            {"prompt_token_ids": [*output.prompt_token_ids, *output.outputs[0].token_ids]}
            for output in outputs
        ]
        again = [
            serve(llm, text, [request_value])[0]
            for text, setting in zip(longer, settings, strict=True)
            for request_value in ({}, setting)
        ]
    assert [output.num_cached_tokens for output in outputs] == [0] + [96] * 7
    check(outputs, settings, reference, steers)
    check(
        again,
        [request_value for setting in settings for request_value in ({}, setting)],
        reference,
        steers,
    )


@pytest.fixture(scope="module")
def llm(reference: Any) -> Iterator[Any]:
    # Few blocks: their memory is touched one by one, and then no more of it.
    options = {"max_num_seqs": 96, "block_size": BLOCK, "num_gpu_blocks_override": 256}
    with engine(embedded.MODEL, CONFIG, **options) as llm:
        yield llm


def finished(core: Any, count: int) -> list[Any]:
    """Run an engine until that many requests have ended."""
    outputs: list[Any] = []
    while len(outputs) < count:
        outputs += [output for output in core.step() if output.finished]
    return outputs


def test_a_failed_stream_ends_only_its_own_request(llm: Any, reference: Any, steers: Any) -> None:
    from vllm.v1.request import RequestStatus

    core, scheduler = llm.llm_engine, scheduler_of(llm)
    settings: list[Setting] = [TWO, {}, FRENCH, HEAD]
    requests = zip(texts(4, 12), reporting(greedy(settings, max_tokens=30)), strict=True)
    ids = [core.add_request(str(index), *request) for index, request in enumerate(requests)]
    for _ in range(7):
        assert not any(output.finished for output in core.step())
    group = scheduler.vllm_steer_streams.groups[ids[0]]
    scheduler.finish_requests(next(iter(group.streams)), RequestStatus.FINISHED_ABORTED)
    outputs = sorted(finished(core, 4), key=lambda output: output.request_id)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", *["length"] * 3]
    assert len(outputs[0].outputs[0].token_ids) < 10
    assert leftovers(llm) == {} and pooled_strengths(llm) == 0
    check(outputs[1:], settings[1:], reference, steers)


def test_a_request_that_is_aborted_at_any_moment_leaves_nothing(llm: Any) -> None:
    core = llm.llm_engine
    for moment in range(8):
        (request_id,) = [core.add_request("gone", texts(1, 40)[0], *reporting(greedy([THREE])))]
        for _ in range(moment):
            core.step()
        core.abort_request(["gone"])
        while core.has_unfinished_requests() or scheduler_of(llm).has_requests():
            core.step()
        assert leftovers(llm) == {}, f"{request_id} after {moment} steps"
        assert pooled_strengths(llm) == 0, f"{request_id} after {moment} steps"


@pytest.mark.matrix
def test_many_requests_with_aborts_leave_nothing_and_no_memory(llm: Any) -> None:
    core, rng = llm.llm_engine, random.Random(5)
    prompts = texts(50, 40)
    settings = [THREE, FRENCH, HEAD, TWO, {**FRENCH, **HEAD}, {**FRENCH, "formality": 2.0}]
    memory, objects = 0.0, 0
    live: set[str] = set()
    started = ended = aborted = 0
    while ended < MANY:
        while len(live) < 16 and started < MANY:
            (params,) = reporting(greedy([settings[started % 6]], max_tokens=rng.randint(1, 12)))
            core.add_request(str(started), prompts[started % 50], params)
            live.add(str(started))
            started += 1
        finished = {output.request_id for output in core.step() if output.finished}
        if live - finished and rng.random() < 0.1:
            victim = rng.choice(sorted(live - finished))
            core.abort_request([victim])
            finished.add(victim)
            aborted += 1
        live -= finished
        ended += len(finished)
        if ended >= SETTLED and not memory:
            memory, objects = resident_mib(), num_objects()
    while scheduler_of(llm).has_requests():
        core.step()
    assert aborted > MANY // 20
    assert leftovers(llm) == {} and pooled_strengths(llm) == 0
    assert num_objects() - objects < MANY - SETTLED  # one for each request since
    if RUNNER == "v1":  # Triton's interpreter takes memory at every step, of ordinary requests too
        assert resident_mib() - memory < 32
