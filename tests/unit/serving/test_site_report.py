"""Reports of the self-test, of several ranks, as one."""

from vllm_steer.site_report import join_reports


def test_layers_of_all_stages_are_joined_and_a_refusal_of_one_rank_counts() -> None:
    first = {"resid": {"proof": "proved", "layers": [0, 1], "refused": {}}}
    other_rank = {"resid": {"proof": "proved", "layers": [0], "refused": {"1": "a reason"}}}
    second = {"resid": {"proof": "proved", "layers": [2], "refused": {}}}
    expected = {"resid": {"proof": "proved", "layers": [0, 2], "refused": {"1": "a reason"}}}
    assert join_reports([first, other_rank, second]) == expected
    assert join_reports([second, other_rank, first]) == expected
    assert join_reports([None, None]) == {}
