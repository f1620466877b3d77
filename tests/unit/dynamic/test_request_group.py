"""The streams of one request: which are due, which are needed, and the reported strengths."""

from fake_scheduler import FakeRequest
from vllm.v1.request import RequestStatus

from vllm_steer.doses import Dose, Dynamic
from vllm_steer.serving.dynamic.request_group import RequestGroup


def group_of(*steps: int | None, at_head: int = 0) -> RequestGroup:
    """A group of running members with a prompt of three tokens."""
    names = ["base", *map(str, range(len(steps)))]
    members = [FakeRequest(name, 3, 9, 0.0) for name in ("main", *names)]
    for member in members:
        member.status = RequestStatus.RUNNING
    doses = tuple(Dose(f"s{i}", 1.0, dynamic=Dynamic()) for i in range(len(steps) + at_head))
    return RequestGroup(
        members[0],
        doses,
        dict(enumerate([*steps, *(at_head * [None])])),
        {member.request_id: member for member in members[1:]},
        {i: str(i) for i in range(len(steps))},
    )


def token(group: RequestGroup, value: int) -> list[str]:
    """Append a token of the main stream; returns the streams that end with it."""
    group.main.append_output_token_ids(value)
    group.num_tokens += 1
    ended = group.drop_finished_streams()
    group.append_token()
    return ended


def test_the_main_stream_is_due_after_all_other_streams() -> None:
    group = group_of(None)
    assert [group.is_pending(member) for member in group.members] == [True, True, False]
    group.pending.discard("base")
    assert [group.is_pending(member) for member in group.members] == [False, True, False]
    group.pending.discard("0")
    assert [group.is_pending(member) for member in group.members] == [False, False, True]


def test_a_blocked_main_stream_is_not_scheduled_until_it_is_released() -> None:
    group = group_of(None)
    main = group.main
    main.num_computed_tokens = 3
    token(group, 7)

    def expected() -> int:
        return main.num_tokens + main.num_output_placeholders - main.num_computed_tokens

    assert expected() == 0
    group.resume_main()
    assert expected() == 1


def test_a_preempted_main_stream_is_not_blocked() -> None:
    group = group_of(None)
    group.main.status = RequestStatus.PREEMPTED
    token(group, 7)
    assert group.main.num_output_placeholders == 0


def test_all_streams_get_the_token_of_the_main_stream() -> None:
    group = group_of(None, None)
    token(group, 7)
    token(group, 5)
    assert [stream.output_token_ids for stream in group.streams.values()] == [[7, 5]] * 3
    assert group.pending == {"base", "0", "1"}


def test_streams_end_with_the_last_step_that_needs_them() -> None:
    group = group_of(1, 3)
    assert [token(group, i) for i in range(4)] == [["0"], [], ["base", "1"], []]
    assert group.members == [group.main]


def test_a_main_stream_runs_freely_after_its_last_stream() -> None:
    group = group_of(1)
    group.pending.clear()
    assert sorted(token(group, 0)) == ["0", "base"]
    assert group.is_pending(group.main)
    assert group.main.num_output_placeholders == 0
    assert group.num_not_running == 0


def test_a_base_stays_for_a_dose_at_the_head() -> None:
    group = group_of(1, at_head=1)
    assert [token(group, i) for i in range(3)] == [["0"], [], []]
    assert list(group.streams) == ["base"]


def test_strengths_are_reported_by_name_and_are_0_if_missing() -> None:
    group = group_of(1, None)
    assert group.named_strengths() == {"s0": 0.0, "s1": 0.0}
    group.strengths = {1: 1.5}
    assert group.named_strengths() == {"s0": 0.0, "s1": 1.5}


def test_a_fixed_dose_has_no_reported_strength() -> None:
    group = group_of(None)
    group.doses = (*group.doses, Dose("fixed", 3.0))
    assert set(group.named_strengths()) == {"s0"}


def test_members_that_do_not_run_need_slots() -> None:
    group = group_of(None)
    assert (group.num_not_running, group.needs_blocks) == (0, False)
    group.main.status = RequestStatus.PREEMPTED
    assert (group.num_not_running, group.needs_blocks) == (1, False)
    group.streams["base"].status = RequestStatus.WAITING
    assert (group.num_not_running, group.needs_blocks) == (2, True)
    group.pending.clear()
    group.main.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    assert group.needs_blocks is False
