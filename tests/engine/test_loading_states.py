"""Any order of loads, unloads, requests and aborts, against a model in plain Python."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from engines import doses_of, engine, greedy, prompts
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from reference import guided_logprobs, load_reference
from tiny_models import GUIDED_LAYERS, HIDDEN, save_tiny_model

from vllm_steer import (
    SteerError,
    VectorSteer,
    load_steer_into,
    save_steer,
    steers_of,
    unload_steer_from,
)
from vllm_steer.serving.runtime.engine_core import residency_of

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

NAMES, CONTENTS, SLOTS, TOKENS = ("a", "b", "c"), 5, 3, 6
names, contents = st.sampled_from(NAMES), st.integers(0, CONTENTS - 1)


@dataclass
class Served:
    """A running engine, the files of its steers, and the tokens that each steer gives alone."""

    llm: Any
    files: list[Path]
    expected: list[list[int]]
    """By content; the last one of no steer."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("states")
    model = save_tiny_model("llama", folder / "model", num_layers=GUIDED_LAYERS)
    files, steers = [], []
    for seed in range(CONTENTS):
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(2, HIDDEN, generator=generator)
        steers.append(VectorSteer(vectors=vectors, layers=(0, 1)))
        files.append(folder / f"{seed}.safetensors")
        save_steer(steers[-1], files[-1])
    reference = load_reference(model)
    expected = [alone(reference, [steer]) for steer in steers] + [alone(reference, [])]
    assert len(set(map(tuple, expected))) == CONTENTS + 1  # each steer shows in the text
    room = {"lm_steers": 0, "vectors": SLOTS, "delta_steps": 0}
    config = {"runtime": {"enabled": True, "room": room}}
    with engine(model, config) as llm:
        yield Served(llm, files, expected)


def alone(reference: Any, steers: list[VectorSteer]) -> list[int]:
    """The greedy tokens of the prompt under one steer, by Hugging Face in float64."""
    prompt: list[int] = prompts(1)[0]["prompt_token_ids"]
    ids, named = list(prompt), dict(zip("s", steers, strict=False))
    doses = doses_of({"s": 2.0} if steers else {}, named)
    for _ in range(TOKENS):
        ids.append(int(guided_logprobs(reference, ids, len(prompt), doses, named)[-1].argmax()))
    return ids[len(prompt) :]


def test_any_order_of_changes_and_requests(served: Served) -> None:
    class Changes(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.loaded: dict[str, int] = {}
            self.running: dict[str, int] = {}
            self.count = 0

        @property
        def engine(self) -> Any:
            return served.llm.llm_engine

        def taken(self) -> set[int]:
            """The contents that may not leave their places."""
            return {*self.loaded.values(), *self.running.values()} - {CONTENTS}

        @rule(name=names, content=contents, in_place=st.booleans())
        def load(self, name: str, content: int, in_place: bool) -> None:
            is_free = name not in self.loaded or in_place
            has_room = content in self.taken() or len(self.taken()) < SLOTS
            if is_free and has_room:
                load_steer_into(served.llm, name, served.files[content], load_inplace=in_place)
                self.loaded[name] = content
                return
            message = "all of the room is in use" if is_free else "is loaded already"
            with pytest.raises(SteerError, match=message):
                load_steer_into(served.llm, name, served.files[content], load_inplace=in_place)

        @rule(name=names)
        def unload(self, name: str) -> None:
            if name in self.loaded:
                unload_steer_from(served.llm, name)
                del self.loaded[name]
                return
            with pytest.raises(SteerError, match=f"no steer {name} was loaded"):
                unload_steer_from(served.llm, name)

        @rule(name=st.one_of(st.none(), names))
        def request(self, name: str | None) -> None:
            params = greedy(({name: 2.0} if name else {},), max_tokens=TOKENS, logprobs=None)[0]
            self.count += 1
            request_id = f"{id(self)}-{self.count}"
            if name is not None and name not in self.loaded:
                with pytest.raises(ValueError, match="is unknown"):
                    self.engine.add_request(request_id, prompts(1)[0], params)
                return
            self.engine.add_request(request_id, prompts(1)[0], params)
            self.running[request_id] = CONTENTS if name is None else self.loaded[name]

        @rule(pick=st.randoms(use_true_random=False))
        def abort(self, pick: Any) -> None:
            if self.running:
                request_id = pick.choice(sorted(self.running))
                self.engine.abort_request([request_id])
                del self.running[request_id]

        @rule(times=st.integers(1, 4))
        def step(self, times: int) -> None:
            for _ in range(times):
                for output in self.engine.step() if self.running else ():
                    if output.finished and output.request_id in self.running:
                        content = self.running.pop(output.request_id)
                        assert list(output.outputs[0].token_ids) == served.expected[content]

        @invariant()
        def what_is_listed_is_what_is_loaded(self) -> None:
            entries = {entry["id"]: entry["in_use"] for entry in steers_of(served.llm)}
            in_use = Counter(self.running.values())
            assert entries == {name: in_use[content] for name, content in self.loaded.items()}

        def teardown(self) -> None:
            while self.running:
                self.step(1)
            for name in list(self.loaded):
                unload_steer_from(served.llm, name)
            core = self.engine.engine_core.engine_core
            assert not core.scheduler.requests
            assert not residency_of(core).arriving

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Changes,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
