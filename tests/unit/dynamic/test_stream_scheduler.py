"""The order in which streams are scheduled, their reports, and that no group waits forever."""

from typing import Any

import pytest
from fake_scheduler import FakeEngine, FakeRequest, FakeScheduler, NewScheduler, OldScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

ABORTED = RequestStatus.FINISHED_ABORTED
DONE = (FinishReason.LENGTH, None)


@pytest.fixture(autouse=True, params=[NewScheduler, OldScheduler], ids=["0.31", "0.25"])
def _scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the schedulers of both."""
    kind: type[FakeScheduler] = request.param
    monkeypatch.setattr(FakeEngine, "kind", kind)


def assert_nothing_is_left(engine: FakeEngine) -> None:
    stream_scheduler = engine.stream_scheduler
    assert (stream_scheduler.groups, stream_scheduler._group_of, stream_scheduler._failed) == (
        {},
        {},
        {},
    )
    assert stream_scheduler._in_flight == []
    scheduler = engine.scheduler
    assert (scheduler.requests, scheduler.running, scheduler.waiting) == ({}, [], [])


def abort(engine: FakeEngine, *req_ids: str) -> None:
    engine.scheduler.finish_requests(req_ids, ABORTED)


def report_of(strengths: dict[str, float]) -> Any:
    return {"vllm_steer": {"strengths": strengths}}


def test_base_and_probes_run_before_the_main_stream() -> None:
    engine = FakeEngine()
    group = engine.dynamic("a", prompt=3, max_tokens=3, steps=(None, None))
    names = ("a-base", "a-probe-0", "a-probe-1")
    streams = [group.streams[name] for name in names]
    engine.run()
    prompt, third, fourth = (0, 2), (3, 3), (4, 4)
    assert engine.reads == [
        dict.fromkeys(names, prompt), {"a": prompt},
        dict.fromkeys(names, third), {"a": third},
        dict.fromkeys(names, fourth), {"a": fourth},
    ]  # fmt: skip
    tokens = [token for token, _ in engine.reports["a"]]
    assert [stream.output_token_ids for stream in streams] == [tokens[:2]] * 3
    assert [report for _, report in engine.reports["a"]] == [
        report_of({"steer0": 10.0 * step, "steer1": 10.0 * step + 1}) for step in range(3)
    ]
    assert engine.ends == {"a": DONE}
    assert_nothing_is_left(engine)


def test_a_request_of_one_token_takes_two_steps() -> None:
    engine = FakeEngine()
    engine.dynamic("a", max_tokens=1)
    engine.run()
    assert [set(reads) for reads in engine.reads] == [{"a-base", "a-probe-0"}, {"a"}]
    assert_nothing_is_left(engine)


def test_all_streams_read_a_chunked_prompt_before_the_main_stream_goes_on() -> None:
    engine = FakeEngine(budget=3)
    engine.dynamic("a", prompt=7, max_tokens=2)
    engine.run()
    order = [(req_id, span) for reads in engine.reads for req_id, span in reads.items()]
    first_of_main = next(i for i, (req_id, _) in enumerate(order) if req_id == "a")
    assert {span[1] for r, span in order[:first_of_main] if r == "a-base"} == {2, 5, 6}
    assert [s for r, s in order if r == "a"][-1] == (7, 7)
    assert engine.ends == {"a": DONE}
    assert_nothing_is_left(engine)


def test_ordinary_requests_go_on_beside_a_group() -> None:
    engine = FakeEngine()
    engine.plain("x", max_tokens=5)
    engine.dynamic("a", max_tokens=2)
    engine.run()
    assert [reads["x"] for reads in engine.reads if "x" in reads] == [
        (0, 2), (3, 3), (4, 4), (5, 5), (6, 6),
    ]  # fmt: skip
    assert len([reads for reads in engine.reads if "x" in reads]) == 5
    assert all(report is None for _, report in engine.reports["x"])


def test_a_request_that_is_its_own_base_takes_one_step_a_token() -> None:
    engine = FakeEngine()
    engine.dynamic("a", max_tokens=3, steps=(), at_head=2)
    engine.run()
    assert [set(reads) for reads in engine.reads] == [{"a"}] * 3
    assert [report for _, report in engine.reports["a"]] == [
        report_of({"steer0": 10.0 * step, "steer1": 10.0 * step + 1}) for step in range(3)
    ]
    assert_nothing_is_left(engine)


def test_a_probe_ends_with_its_delta_and_the_last_probe_ends_the_base() -> None:
    engine = FakeEngine()
    engine.dynamic("a", max_tokens=5, steps=(1, 3))
    engine.run()
    assert [set(reads) for reads in engine.reads] == [
        {"a-base", "a-probe-0", "a-probe-1"}, {"a"},
        {"a-base", "a-probe-1"}, {"a"},
        {"a-base", "a-probe-1"}, {"a"},
        {"a"}, {"a"},
    ]  # fmt: skip
    assert [report["vllm_steer"]["strengths"] for _, report in engine.reports["a"]] == [
        {"steer0": 0.0, "steer1": 1.0},
        {"steer0": 0.0, "steer1": 11.0},
        {"steer0": 0.0, "steer1": 21.0},
        {"steer0": 0.0, "steer1": 0.0},
        {"steer0": 0.0, "steer1": 0.0},
    ]
    assert_nothing_is_left(engine)


def test_a_base_outlives_the_probes_where_a_dose_at_the_head_needs_it() -> None:
    engine = FakeEngine()
    engine.dynamic("a", max_tokens=3, steps=(1,), at_head=1)
    engine.run()
    assert [set(reads) for reads in engine.reads] == [
        {"a-base", "a-probe-0"}, {"a"}, {"a-base"}, {"a"}, {"a-base"}, {"a"},
    ]  # fmt: skip


@pytest.mark.parametrize("steps", range(7))
def test_an_aborted_request_ends_its_streams(steps: int) -> None:
    """Before it was ever scheduled, while it is held, between two of its tokens."""
    engine = FakeEngine(budget=4)
    engine.dynamic("a", prompt=3, max_tokens=9)
    engine.plain("x", max_tokens=9)
    for _ in range(steps):
        engine.step()
    abort(engine, "a")
    assert set(engine.scheduler.requests) == {"x"}
    engine.run()
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("steps", range(5))
def test_an_abort_while_a_step_is_computed_is_a_clean_end(steps: int) -> None:
    engine = FakeEngine()
    engine.dynamic("a", max_tokens=9)
    for _ in range(steps):
        engine.step()
    engine.during = lambda: abort(engine, "a")
    engine.step()
    assert_nothing_is_left(engine)


def test_all_requests_may_be_ended_at_once() -> None:
    engine = FakeEngine()
    engine.dynamic("a")
    engine.dynamic("b")
    engine.plain("x")
    engine.step()
    engine.scheduler.finish_requests(None, ABORTED)
    assert_nothing_is_left(engine)


def test_an_id_can_be_reused_at_once() -> None:
    engine = FakeEngine()
    engine.dynamic("a", prompt=2, max_tokens=9)
    for _ in range(4):
        engine.step()
    abort(engine, "a")
    engine.reads.clear()
    engine.dynamic("a", prompt=5, max_tokens=1)
    engine.run()
    assert engine.reads == [{"a-base": (0, 4), "a-probe-0": (0, 4)}, {"a": (0, 4)}]
    assert engine.ends == {"a": DONE}
    assert_nothing_is_left(engine)


def test_a_stream_that_ends_before_its_request_ends_it_with_an_error() -> None:
    engine = FakeEngine()
    engine.dynamic("a", max_tokens=9)
    engine.plain("x", max_tokens=9)
    for _ in range(3):
        engine.step()
    abort(engine, "a-probe-0")
    engine.step()
    reason, message = engine.ends["a"]
    assert reason == FinishReason.ERROR
    assert "a-probe-0 ended before it" in message
    engine.run()
    assert set(engine.ends) == {"a", "x"}
    assert_nothing_is_left(engine)


def test_a_reused_id_of_a_failed_request_does_not_fail() -> None:
    engine = FakeEngine()
    engine.dynamic("a", max_tokens=9)
    engine.step()
    abort(engine, "a-base")
    abort(engine, "a")
    engine.dynamic("a", max_tokens=1)
    engine.run()
    assert engine.ends == {"a": DONE}
    assert_nothing_is_left(engine)


def test_strengths_that_never_come_end_the_request_with_an_error() -> None:
    engine = FakeEngine()
    engine.answers = False
    engine.dynamic("a")
    engine.run()
    assert engine.ends["a"][0] == FinishReason.ERROR
    assert "not computed" in engine.ends["a"][1]
    assert_nothing_is_left(engine)


def test_a_group_starts_only_when_every_member_has_a_slot() -> None:
    engine = FakeEngine(max_num_seqs=5)
    engine.dynamic("a", max_tokens=2)
    engine.dynamic("b", max_tokens=2)
    engine.run()
    order = [req_id for reads in engine.reads for req_id in reads]
    last_of_a = max(i for i, req_id in enumerate(order) if req_id.startswith("a"))
    assert min(i for i, req_id in enumerate(order) if req_id.startswith("b")) > last_of_a
    assert engine.scheduler.num_preempted == 0
    assert_nothing_is_left(engine)


def test_a_group_starts_under_a_constant_load_of_ordinary_requests() -> None:
    engine = FakeEngine(max_num_seqs=4)
    for i in range(4):
        engine.plain(f"x{i}", max_tokens=3 + i)
    engine.dynamic("a", max_tokens=2)
    for i in range(4, 60):
        engine.plain(f"x{i}", max_tokens=3 + i % 4)
    for _ in range(20):
        engine.step()
    assert engine.ends["a"] == DONE


def test_a_request_whose_grammar_is_not_ready_waits_and_then_goes_on() -> None:
    engine = FakeEngine()
    main = engine.dynamic("a", max_tokens=2).main
    main.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    main.grammar_is_ready = False
    engine.plain("x", max_tokens=2)
    for _ in range(5):
        engine.step()
    assert [set(reads) for reads in engine.reads][2:] == [set()] * 3
    main.grammar_is_ready = True
    engine.run()
    assert engine.ends == {"a": DONE, "x": DONE}


@pytest.mark.parametrize("steps", range(8))
def test_all_running_requests_may_be_preempted_at_any_time(steps: int) -> None:
    engine = FakeEngine()
    group = engine.dynamic("a", max_tokens=4)
    for _ in range(steps):
        engine.step()
    engine.scheduler.reset_prefix_cache()
    engine.run()
    assert [report["vllm_steer"]["strengths"] for _, report in engine.reports["a"]] == [
        {"steer0": 10.0 * step} for step in range(4)
    ]
    assert group.main.num_output_tokens == 4
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("victim", ["a", "a-base", "a-probe-0"])
@pytest.mark.parametrize("steps", range(2, 6))
def test_a_preempted_member_recomputes_its_text_when_it_is_scheduled(
    victim: str, steps: int
) -> None:
    engine = FakeEngine()
    group = engine.dynamic("a", max_tokens=4)
    for _ in range(steps):
        engine.step()
    member = group.member(victim)
    if member.status == RequestStatus.RUNNING:
        engine.scheduler.running.remove(member)
        engine.scheduler._preempt_request(member, 0.0)
    engine.run()
    assert engine.ends == {"a": DONE}
    assert [report["vllm_steer"]["strengths"] for _, report in engine.reports["a"]] == [
        {"steer0": 10.0 * step} for step in range(4)
    ]
    assert_nothing_is_left(engine)


def test_groups_that_do_not_fit_together_run_in_order_of_arrival() -> None:
    engine = FakeEngine(num_blocks=45)
    for name in "abc":
        engine.dynamic(name, prompt=4, max_tokens=8)
    engine.run()
    assert engine.ends == dict.fromkeys("abc", DONE)
    assert list(engine.ends) == list("abc")
    assert engine.scheduler.num_preempted > 0
    assert_nothing_is_left(engine)


def test_a_lone_group_that_does_not_fit_ends_with_an_error() -> None:
    engine = FakeEngine(num_blocks=20)
    engine.dynamic("a", prompt=4, max_tokens=8)
    engine.run()
    assert engine.ends["a"][0] == FinishReason.ERROR
    assert "do not fit" in engine.ends["a"][1]
    assert_nothing_is_left(engine)


def test_a_group_that_does_not_fit_leaves_the_others_alone() -> None:
    engine = FakeEngine(num_blocks=30)
    engine.dynamic("a", prompt=4, max_tokens=20)
    engine.dynamic("b", prompt=2, max_tokens=3)
    engine.plain("x", prompt=2, max_tokens=3)
    engine.run()
    assert engine.ends["a"][0] == FinishReason.ERROR
    assert (engine.ends["b"], engine.ends["x"]) == (DONE, DONE)
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("num_blocks", range(24, 44, 2))
def test_a_group_that_fits_alone_outlives_the_pressure_of_ordinary_requests(
    num_blocks: int,
) -> None:
    engine = FakeEngine(num_blocks=num_blocks)
    engine.plain("x", prompt=4, max_tokens=14)
    engine.dynamic("a", prompt=4, max_tokens=4)
    engine.plain("y", prompt=4, max_tokens=14)
    engine.run()
    assert engine.ends == dict.fromkeys("axy", DONE)
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_requests_finishes(seed: int) -> None:
    import random

    rng = random.Random(seed)
    engine = FakeEngine(
        max_num_seqs=rng.randint(4, 9), num_blocks=rng.randint(60, 120), budget=rng.randint(2, 9)
    )
    alive: list[str] = []
    for step in range(120):
        if step < 60 and rng.random() < 0.5:
            name = f"r{step}"
            prompt, length = rng.randint(1, 6), rng.randint(1, 6)
            kind = rng.random()
            if kind < 0.4:
                engine.plain(name, prompt, length)
            elif kind < 0.9:
                steps = [rng.choice((None, 1, 3)) for _ in range(rng.randint(1, 2))]
                engine.dynamic(name, prompt, length, steps=steps, at_head=rng.randint(0, 1))
            else:
                engine.dynamic(name, prompt, length, steps=(), at_head=1)
            alive.append(name)
        if alive and rng.random() < 0.08:
            abort(engine, alive.pop(rng.randrange(len(alive))))
        if rng.random() < 0.03:
            engine.scheduler.reset_prefix_cache()
        engine.step()
    engine.run(2_000)
    assert all(end == DONE for end in engine.ends.values()), engine.ends
    assert set(alive) <= set(engine.ends)
    assert_nothing_is_left(engine)


def test_a_full_pause_preempts_nothing() -> None:
    engine = FakeEngine(num_blocks=45)
    engine.dynamic("a", prompt=4, max_tokens=8)
    engine.dynamic("b", prompt=4, max_tokens=8)
    for _ in range(3):
        engine.step()
    before = engine.scheduler.num_preempted
    engine.scheduler.pause_state = PauseState.PAUSED_ALL
    for _ in range(5):
        assert engine.step() == {}
    assert engine.scheduler.num_preempted == before
    engine.scheduler.pause_state = PauseState.UNPAUSED
    engine.run()
    assert engine.ends == {"a": DONE, "b": DONE}


@pytest.mark.parametrize("steps", range(6))
def test_a_pause_that_waits_for_running_requests_finishes(steps: int) -> None:
    """A group whose main stream has no seat yet cannot go on: it waits as a whole."""
    engine = FakeEngine()
    engine.dynamic("a", max_tokens=3)
    for _ in range(steps):
        engine.step()
    engine.scheduler.pause_state = PauseState.PAUSED_NEW
    for _ in range(10):
        engine.step()
    assert engine.scheduler.running == []
    engine.scheduler.pause_state = PauseState.UNPAUSED
    engine.run()
    assert engine.ends == {"a": DONE}
    assert_nothing_is_left(engine)


def test_an_ordinary_request_is_ignored_by_the_stream_scheduler() -> None:
    engine = FakeEngine()
    request: FakeRequest = engine.plain("x", max_tokens=2)
    engine.run()
    assert request.num_output_tokens == 2
    assert [set(reads) for reads in engine.reads] == [{"x"}, {"x"}]
