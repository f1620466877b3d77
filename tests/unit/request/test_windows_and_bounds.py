"""The options ``phase`` with windows, ``low`` and ``high`` of a request."""

import math
from typing import Any

import pytest
import torch
from guidance import delta, vector

from vllm_steer.doses import TokenWindows
from vllm_steer.errors import SteerRequestError
from vllm_steer.request import read_dose
from vllm_steer.steers import SAESteer, Steer

STEERS: dict[str, Steer] = {
    "push": vector((0, 1)),
    "walk": delta(4, (0,)),
    "ablate": vector((0, 1), mode="project"),
    "band": vector((0, 1), mode="project", low=-1.0, high=math.inf),
    "pin": SAESteer(
        encoder=torch.ones(1, 5),
        decoder=torch.ones(1, 5),
        bias=torch.zeros(1),
        threshold=torch.zeros(1),
        layers=(1,),
        low=2.0,
        high=2.0,
    ),
}


def windows(prompt: Any = (), answer: Any = ()) -> TokenWindows:
    return TokenWindows(tuple(prompt), tuple(answer))


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ({"prompt": "-4:"}, windows([(-4, None)])),
        ({"prompt": ":2"}, windows([(None, 2)])),
        ({"prompt": ":"}, windows([(None, None)])),
        ({"prompt": "-1"}, windows([(-1, None)])),
        ({"prompt": -2}, windows([(-2, -1)])),
        ({"prompt": 0}, windows([(0, 1)])),
        ({"prompt": " 1 : -1 "}, windows([(1, -1)])),
        ({"answer": "0:8"}, windows((), [(0, 8)])),
        ({"answer": "3:"}, windows((), [(3, None)])),
        ({"answer": 5}, windows((), [(5, 6)])),
        ({"prompt": [":7", "-7:"], "answer": ["0:2", 4]}, windows(
            [(None, 7), (-7, None)], [(0, 2), (4, 5)]
        )),
    ],
)  # fmt: skip
def test_windows_are_slices_of_the_prompt_and_of_the_answer(
    phase: Any, expected: TokenWindows
) -> None:
    assert read_dose("push", {"phase": phase}, STEERS["push"]).phase == expected


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({}, "with no key; allowed: all, prompt"),
        ({"answers": "0:8"}, "answers; allowed: all, prompt"),
        ({"answer": "-3:"}, "indices from 0: an answer's length is not known"),
        ({"answer": "0:-1"}, "indices from 0"),
        ({"answer": "4:4"}, "at least one token"),
        ({"answer": "8:3"}, "at least one token"),
        ({"prompt": "-1:-4"}, "at least one token"),
        ({"prompt": ":0"}, "at least one token"),
        ({"prompt": "0:8:2"}, "first:last, such as"),
        ({"prompt": "1.5"}, "first:last, such as"),
        ({"prompt": True}, "first:last, such as"),
        ({"prompt": None}, "first:last, such as"),
        ({"prompt": "9999999999:"}, "first:last, such as"),
        ({"prompt": []}, "one window, or a list of up to 4"),
        ({"prompt": [":1"] * 5}, "one window, or a list of up to 4"),
        ({"prompt": [[":1"]]}, "first:last, such as"),
        ("before", "allowed: all, prompt, generation, text, answer, last"),
        (7, "allowed: all, prompt, generation, text, answer, last"),
    ],
)
def test_a_window_that_selects_nothing_or_is_none_is_refused(phase: Any, message: str) -> None:
    with pytest.raises(SteerRequestError, match=message):
        read_dose("push", {"phase": phase}, STEERS["push"])


def test_a_delta_needs_a_step_in_its_windows() -> None:
    assert read_dose("walk", {"phase": {"answer": "3:9"}}, STEERS["walk"])
    with pytest.raises(SteerRequestError, match="no token at which the steps of its delta act"):
        read_dose("walk", {"phase": {"answer": "4:9"}}, STEERS["walk"])
    with pytest.raises(SteerRequestError, match="no token at which the steps of its delta act"):
        read_dose("walk", {"phase": {"prompt": ":-1"}}, STEERS["walk"])


@pytest.mark.parametrize(
    ("name", "options", "bounds"),
    [
        ("ablate", {}, (0.0, 0.0)),
        ("ablate", {"low": -1, "high": "2.5"}, (-1.0, 2.5)),
        ("ablate", {"low": "-inf"}, (-math.inf, 0.0)),
        ("band", {}, (-1.0, math.inf)),
        ("band", {"high": 3}, (-1.0, 3.0)),
        ("pin", {}, (2.0, 2.0)),
        ("pin", {"low": 0, "high": 0}, (0.0, 0.0)),
        ("push", {}, (None, None)),
        ("ablate", {"strength": "dynamic", "high": 1}, (0.0, 1.0)),
    ],
)
def test_a_request_may_change_the_bounds_of_a_steer_that_has_some(
    name: str, options: Any, bounds: tuple[float | None, float | None]
) -> None:
    dose = read_dose(name, options, STEERS[name])
    assert (dose.low, dose.high) == bounds


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("push", {"low": 1}, "low 1, which only mode project of a vector and mode clamp"),
        ("ablate", {"low": 1}, "low 1 and high 0; low must be at most high"),
        ("ablate", {"low": "inf", "high": "inf"}, "low must be at most high"),
        ("ablate", {"high": "nan"}, "expected a number"),
        ("ablate", {"high": "Infinity"}, "'inf' or '-inf' for no bound"),
        ("ablate", {"high": [1]}, "expected a number"),
        ("ablate", {"high": True}, "expected a number"),
    ],
)
def test_bounds_that_cannot_be_are_refused(name: str, options: Any, message: str) -> None:
    with pytest.raises(SteerRequestError, match=message):
        read_dose(name, options, STEERS[name])
