"""Prefix-cache keys, by vLLM's own requests and block hashes: shared where KV is equal, no more."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_tools import engine_config
from guidance import delta, head, plan_for, vector
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils import hashing
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from vllm_steer.compat.patching import wrap
from vllm_steer.doses import Dose, TokenWindows
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.admission import admit_and_set_cache_key
from vllm_steer.serving.cache_key import SteeredSalt, steered_salt, with_steer_keys
from vllm_steer.serving.request_args import STREAM, StreamRequest, doses_of

STEERS: dict[str, Any] = {
    "push": vector((0, 1, 2)),
    "twin": vector((0, 1, 2)),
    "spin": vector((1,), mode="rotate", seed=1),
    "walk": delta(3, (0, 2)),
    "step": delta(1, (0, 2), seed=1),
    "word": head(),
}
PRESETS = {
    "mix": {"push": 2.0, "walk": {"strength": 1.0, "schedule": "start"}},
    "late": {"push": {"strength": 4, "phase": "generation", "layers": "0-1"}},
}
PLAN = plan_for(STEERS, presets=PRESETS)
LENGTH = 40
TOKENS = list(range(1000, 1000 + LENGTH))

ALGORITHMS = ["sha256", "sha256_cbor"] + (
    ["xxhash", "xxhash_cbor"] if hashing._xxhash is not None else []
)


@pytest.fixture(autouse=True)
def extra_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own function under the plugin's wrapper, as in an engine core with a plan."""
    original = inspect.unwrap(kv_cache_utils.generate_block_hash_extra_keys)
    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", original)
    wrap(kv_cache_utils, "generate_block_hash_extra_keys", with_steer_keys)
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"the first block's parent", raising=False)


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[4, 16], ids=["block-4", "block-16"])
def block(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def keyed(
    steer: Any,
    *,
    prompt_len: int = 10,
    salt: str | None = None,
    block: int = 4,
    algorithm: str = "sha256",
    plan: SteerPlan = PLAN,
    **fields: Any,
) -> Request:
    """A request as it passes the engine core's door."""
    arguments = None if steer is None else {"steer": steer}
    arrival = core_request(arguments, prompt_len, salt)
    for name, value in fields.items():
        setattr(arrival, name, value)
    admit_and_set_cache_key(arrival, engine(plan))
    return scheduled(arrival, block=block, algorithm=algorithm)


def engine(plan: SteerPlan) -> Any:
    """The config of an engine that can serve dynamic strengths."""
    return engine_config(plan, scheduler_config__async_scheduling=False)


def core_request(
    arguments: dict[str, Any] | None, prompt_len: int, salt: str | None
) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=TOKENS[:prompt_len],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=LENGTH, extra_args=arguments),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=salt,
        data_parallel_rank=None,
    )


def scheduled(core_request: EngineCoreRequest, *, block: int, algorithm: str) -> Request:
    """The scheduler's request with all of its tokens, generated ones one by one."""
    hash_function = hashing.get_hash_fn_by_name(algorithm)
    request = Request.from_engine_core_request(
        core_request, kv_cache_utils.get_request_block_hasher(block, hash_function)
    )
    for token in TOKENS[request.num_prompt_tokens :]:
        request.append_output_token_ids(token)
    return request


def stream_keys(
    steer: Any, dose: int | None, *, prompt_len: int = 10, salt: str | None = None, block: int = 4
) -> list[bytes]:
    """The keys of a dynamic request's base (None), or of the probe of its dose ``dose``."""
    stream = StreamRequest("r", steer, dose).to_args()
    arrival = core_request({STREAM: stream}, prompt_len, salt)
    arrival.request_id = f"r-{dose}"
    arrival.cache_salt = steered_salt(arrival, doses_of(arrival.sampling_params, PLAN), PLAN)
    return list(scheduled(arrival, block=block, algorithm="sha256").block_hashes)


def keys(steer: Any, **options: Any) -> list[bytes]:
    """The keys of all full blocks."""
    return list(keyed(steer, **options).block_hashes)


def shared(one: list[bytes], other: list[bytes]) -> int:
    """How many blocks from the front have the same key; after them none has."""
    same = [a == b for a, b in zip(one, other, strict=True)]
    count = sum(same)
    assert same == [True] * count + [False] * (len(same) - count)
    return count


PROMPT, LATE = {"phase": "prompt"}, {"phase": "generation"}


@pytest.mark.parametrize("prompt_len", [1, 3, 4, 5, 10, 16, 17, 39])
@pytest.mark.parametrize(
    ("steer", "begins"),
    [
        ({"push": 2}, lambda prompt_len: 0),
        ({"spin": 2}, lambda prompt_len: 0),
        ({"push": {"strength": 2, **PROMPT}}, lambda prompt_len: 0),
        ({"push": {"strength": 2, **LATE}}, lambda prompt_len: prompt_len),
        ({"push": {"strength": 2, "layers": "2", **LATE}}, lambda prompt_len: prompt_len),
        ({"walk": 2}, lambda prompt_len: prompt_len - 1),
        ({"walk": {"schedule": "start"}}, lambda prompt_len: prompt_len - 1),
        ({"walk": {"schedule": "dim", **PROMPT}}, lambda prompt_len: prompt_len - 1),
        ({"walk": LATE}, lambda prompt_len: prompt_len),
        ({"step": {"schedule": "dim"}}, lambda prompt_len: prompt_len - 1),
        ({"push": LATE, "walk": 2}, lambda prompt_len: prompt_len - 1),
        ({"push": LATE, "spin": PROMPT, "word": 3}, lambda prompt_len: 0),
        ({"word": 3}, lambda prompt_len: LENGTH),
        ({"push": 0.0, "word": 1}, lambda prompt_len: LENGTH),
        ("none", lambda prompt_len: LENGTH),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_blocks_before_the_first_token_that_a_steer_changes_stay_shared(
    steer: Any, begins: Any, prompt_len: int, block: int
) -> None:
    plain = keys(None, prompt_len=prompt_len, block=block)
    block_keys = keys(steer, prompt_len=prompt_len, block=block)
    assert shared(plain, block_keys) == min(begins(prompt_len), LENGTH) // block


def test_every_algorithm_shares_the_same_blocks(algorithm: str, block: int) -> None:
    def of(steer: Any, **options: Any) -> list[bytes]:
        return keys(steer, block=block, algorithm=algorithm, **options)

    for salt in (None, "mine"):
        plain, always = of(None, salt=salt), of({"push": 2}, salt=salt)
        assert shared(plain, of({"word": 2}, salt=salt)) == len(plain)
        assert shared(plain, of({"push": LATE}, salt=salt)) == 10 // block
        assert shared(plain, of({"walk": 1}, salt=salt)) == 9 // block
        assert shared(always, of("push:2", salt=salt)) == len(plain)
        assert shared(always, of({"push": {"strength": 2, **PROMPT}}, salt=salt)) == 10 // block
        assert shared(always, of({"push": 2, "walk": 1}, salt=salt)) == 9 // block
        assert shared(always, of({"push": 2, "walk": 1, "spin": LATE}, salt=salt)) == 9 // block


@pytest.mark.parametrize(("prompt_len", "blocks"), [(1, 0), (4, 1), (10, 2), (12, 3), (39, 9)])
def test_all_and_prompt_are_the_same_within_the_prompt(prompt_len: int, blocks: int) -> None:
    always = keys({"push": 2}, prompt_len=prompt_len)
    prompt = keys({"push": {"strength": 2, **PROMPT}}, prompt_len=prompt_len)
    assert shared(always, prompt) == blocks


@pytest.mark.parametrize(
    ("steer", "blocks"),
    [
        ({"push": 2}, 10),
        ({"push": {"strength": 2, **PROMPT}}, 2),
        ({"push": {"strength": 2, **LATE}}, 2),
        ({"walk": 2}, 2),
        (None, 10),
    ],
    ids=str,
)
def test_a_longer_prompt_with_the_same_text_shares_until_the_shorter_one_ends(
    steer: Any, blocks: int
) -> None:
    """The second prompt repeats the generated text of the first request."""
    assert shared(keys(steer, prompt_len=10), keys(steer, prompt_len=14)) == blocks


SPELLINGS: list[tuple[Any, Any]] = [
    ("push:2", {"push": 2}),
    ("push:2", '{"push": {"strength": 2.0}}'),
    ("push:1,push:1", {"push": {"strength": 2, "phase": "all", "layers": "0-2"}}),
    ("push:2", {"twin": 2}),
    ("mix", {"push": 2, "walk": {"strength": 1, "schedule": "start"}}),
    ("mix:-0.5", {"walk": {"strength": -0.5, "schedule": "start"}, "push": -1}),
    ("late", {"twin": {"strength": 4, "layers": [1, 0], **LATE}}),
    ({"walk": {}}, {"walk": {"strength": 1, "schedule": "fixed", "layers": [0, 2]}}),
    ("push:2,spin:3", "spin:3,push:2"),
    ("push:2,spin:0", "push:2"),
    ("push:2,word:5", "push:2"),
]


@pytest.mark.parametrize(("one", "other"), SPELLINGS, ids=str)
def test_the_same_doses_in_any_notation_have_the_same_keys(one: Any, other: Any) -> None:
    assert keys(one) == keys(other) != keys(None)


APART: list[Any] = [
    None,
    {"push": 2},
    {"push": -2},
    {"push": 2.0000001},
    {"push": {"strength": 2, "layers": "0-1"}},
    {"push": {"strength": 2, "layers": "1-2"}},
    {"push": {"strength": 2, **PROMPT}},
    {"push": {"strength": 2, **LATE}},
    {"push": {"strength": 2, "layers": "0-1", **LATE}},
    {"push": 2, "twin": 2},
    {"push": 2, "spin": 2},
    {"spin": 2},
    {"walk": 2},
    {"walk": -2},
    {"walk": {"strength": 2, "schedule": "dim"}},
    {"walk": {"strength": 2, "schedule": "start"}},
    {"walk": {"strength": 2, **LATE}},
    {"walk": {"strength": 2, **PROMPT}},
    {"walk": {"strength": 2, "layers": "0"}},
    {"step": 2},
    {"push": 2, "walk": 2},
    {"push": {"strength": 2, **LATE}, "walk": 2},
    {"push": {"strength": 2, **PROMPT}, "spin": {"strength": 2, **LATE}},
    {"push": {"strength": 2, **LATE}, "spin": {"strength": 2, **PROMPT}},
    {"push": {"strength": 2, "phase": "answer"}},
    {"push": {"strength": 2, "phase": "last"}},
    {"push": {"strength": 2, "phase": {"answer": "0:4"}}},
    {"push": {"strength": 2, "phase": {"answer": "0:9"}}},
    {"push": {"strength": 2, "phase": {"answer": "3:9"}}},
    {"push": {"strength": 2, "phase": {"answer": ["0:4", "6:9"]}}},
    {"push": {"strength": 2, "phase": {"prompt": ":3", "answer": "0:4"}}},
    {"push": {"strength": 2, "phase": {"prompt": [":3", "-3:"]}}},
    {"push": {"strength": 2, "phase": {"prompt": "2:5"}}},
    {"push": {"strength": 2, "phase": {"prompt": "-3:"}}},
    {"walk": {"strength": 2, "phase": {"answer": "0:2"}}},
    {"walk": {"strength": 2, "phase": {"answer": ["0", "2"]}}},
]


def effects(steer: Any, prompt_len: int) -> list[frozenset[Any]]:
    """What is done to each token: content, layer, step and strength of everything that acts."""
    return [
        frozenset(
            effect for dose in PLAN.doses(steer or "none")
            for effect in one_effect(dose, position, prompt_len)
        )
        for position in range(LENGTH)
    ]  # fmt: skip


def one_effect(dose: Dose, position: int, prompt_len: int) -> Iterator[Any]:
    steer = STEERS[dose.steer]
    is_prompt, step = position < prompt_len, position - prompt_len + 1
    if dose.phase == ("generation" if is_prompt else "prompt"):
        return
    if (dose.phase == "answer" and step < 0) or (dose.phase == "last" and step):
        return
    if isinstance(dose.phase, TokenWindows) and not any(
        begin <= position < end for begin, end in dose.phase.spans(prompt_len)
    ):
        return
    strength = dose.strength
    if steer.kind == "delta":
        if not 0 <= step < steer.steps or (dose.schedule == "start" and step):
            return
        strength *= 1 - step / steer.steps if dose.schedule == "dim" else 1
    for layer in dose.layers or steer.layers:
        yield dose.steer, layer, step if steer.kind == "delta" else None, strength


def test_requests_never_share_a_block_with_different_doses(block: int) -> None:
    lengths = (1, 4, 9, 10, 12)
    block_keys = {
        (i, p): (keys(steer, prompt_len=p, block=block), effects(steer, p))
        for i, steer in enumerate(APART)
        for p in lengths
    }
    for (one, one_does), (other, other_does) in itertools.combinations(block_keys.values(), 2):
        like = sum(1 for _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(one_does, other_does, strict=True)
        ))  # fmt: skip
        assert shared(one, other) <= like // block


TEXT = {"phase": "text"}
IMAGES: list[list[tuple[str, int, int]]] = [  # identifier, first token, tokens
    [],
    [("cat", 0, 3)],
    [("dog", 0, 3)],
    [("cat", 2, 5)],
    [("cat", 0, 3), ("dog", 5, 2)],
    [("cat", 6, 2), ("cat", 9, 1)],
]
WITH_IMAGES: list[Any] = [
    None,
    {"push": 2},
    {"push": {"strength": 2, **TEXT}},
    {"push": {"strength": 2, **PROMPT}},
    {"push": {"strength": 2, **LATE}},
    {"push": {"strength": 2, **TEXT}, "spin": 2},
    {"push": 2, "spin": {"strength": 2, **TEXT}},
    {"walk": {"strength": 2, **TEXT}},
    {"walk": 2},
]


def features(images: list[tuple[str, int, int]]) -> list[MultiModalFeatureSpec]:
    return [
        MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, length))
        for name, offset, length in images
    ]


def effects_with_images(
    steer: Any, prompt_len: int, images: list[tuple[str, int, int]]
) -> list[frozenset[Any]]:
    """What is done to each token, and which image it is a part of."""
    image_of = {
        token: (name, offset) for name, offset, n in images for token in range(offset, offset + n)
    }
    return [
        frozenset([
            ("image", *image_of.get(position, ())),
            *(
                effect
                for dose in PLAN.doses(steer or "none")
                if not (dose.phase == "text" and position in image_of)
                for effect in one_effect(dose, position, prompt_len)
            ),
        ])
        for position in range(LENGTH)
    ]  # fmt: skip


def test_requests_with_images_never_share_a_block_with_different_doses(block: int) -> None:
    cases = [
        (
            keys(steer, prompt_len=length, block=block, mm_features=features(images)),
            effects_with_images(steer, length, images),
        )
        for steer in WITH_IMAGES
        for images in IMAGES
        for length in (10, 11, 16)
    ]
    for (one, one_does), (other, other_does) in itertools.combinations(cases, 2):
        like = sum(1 for _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(one_does, other_does, strict=True)
        ))  # fmt: skip
        assert shared(one, other) <= like // block


def test_a_dose_of_text_shares_blocks_with_the_same_dose_of_all_up_to_an_image() -> None:
    of_text, of_all = {"push": {"strength": 2, **TEXT}}, {"push": 2}
    assert keys(of_text) == keys(of_all) != keys(None)
    images = features([("cat", 9, 2)])
    text, everything = (keys(s, mm_features=images, prompt_len=14) for s in (of_text, of_all))
    assert shared(text, everything) == 2  # blocks of 4 before token 9
    other_image = keys(of_text, mm_features=features([("dog", 9, 2)]), prompt_len=14)
    assert shared(text, other_image) == 2


def test_an_image_at_the_start_is_shared_with_unsteered_requests() -> None:
    images = features([("cat", 0, 9)])
    of_text = keys({"push": {"strength": 2, **TEXT}}, mm_features=images, prompt_len=14)
    assert shared(of_text, keys(None, mm_features=images, prompt_len=14)) == 2


def test_different_requests_have_different_keys_at_the_end_of_their_text() -> None:
    ends = [keys(steer)[-1] for steer in APART]
    assert len(set(ends)) == len(APART)


def test_keys_depend_on_the_content_and_not_on_name_or_file() -> None:
    renamed = plan_for({"other": STEERS["push"], "push": STEERS["spin"]})
    assert keys("push:2") == keys("other:2", plan=renamed)
    assert keys("push:2") != keys("push:2", plan=renamed)


def test_a_default_has_the_key_of_an_explicit_request() -> None:
    plan = plan_for(STEERS, presets=PRESETS, default="mix")
    assert keys(None, plan=plan) == keys("mix")
    assert keys("none", plan=plan) == keys(None)


@pytest.mark.parametrize("steer", [None, "word:2", {"push": LATE}, {"walk": 1}], ids=str)
def test_the_users_salt_is_unchanged_unless_a_steer_acts_from_the_start(steer: Any) -> None:
    request = keyed(steer, salt="mine")
    assert request.cache_salt == "mine"
    assert shared(keys(steer, salt="mine"), keys(steer)) == 0
    assert shared(keys(steer, salt="mine"), keys(steer, salt="yours")) == 0
    assert keys("word:2", salt="mine") == keys(None, salt="mine")


def test_a_steer_from_the_start_is_combined_with_the_users_salt() -> None:
    assert keyed("push:2", salt="mine").cache_salt.startswith("mine|steer:")
    assert keyed("push:2").cache_salt.startswith("|steer:")
    for other in (keys("push:2"), keys("push:2", salt="yours"), keys(None, salt="mine")):
        assert shared(keys("push:2", salt="mine"), other) == 0


@pytest.mark.parametrize("steer", ["push:2", {"push": {"strength": 2, **PROMPT}}], ids=str)
@pytest.mark.parametrize("salt", [None, "mine"])
def test_no_user_salt_can_match_the_blocks_of_a_steer(steer: Any, salt: str | None) -> None:
    """Otherwise an unsteered request could leave its KV for the steered ones to find."""
    forged = str(keyed(steer, salt=salt).cache_salt)
    assert shared(keys(steer, salt=salt), keys(None, salt=forged)) == 0
    assert shared(keys(steer, salt=salt), keys("spin:1", salt=forged)) == 0


def test_a_request_of_embeddings_is_keyed_by_their_number() -> None:
    embeds = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    prompt = {"prompt_token_ids": None, "prompt_embeds": embeds}
    plain = keys(None, **prompt)
    assert len(plain) == LENGTH // 4
    assert shared(plain, keys({"push": LATE}, **prompt)) == 2
    assert shared(plain, keys({"walk": 1}, **prompt)) == 2
    assert shared(plain, keys({"push": 1}, **prompt)) == 0
    assert shared(plain, keys({"word": 1}, **prompt)) == 10


def test_keys_are_plain_values_that_can_be_published() -> None:
    request = keyed({"push": 2, "walk": 1, "spin": LATE}, salt="mine")
    assert isinstance(request.cache_salt, SteeredSalt)
    for start in range(0, LENGTH, 4):
        block_keys, next_mm = kv_cache_utils.generate_block_hash_extra_keys(
            request, start, start + 4, 0
        )
        assert next_mm == 0
        for key in block_keys or ():
            assert [type(part) for part in key] == [str, str]
        events = kv_cache_utils.to_event_extra_keys([block_keys])
        assert events == [None if block_keys is None else tuple(key[1] for key in block_keys)]
    assert kv_cache_utils.generate_block_hash_extra_keys(request, 20, 24, 0) == (None, 0)


def test_other_keys_of_a_block_are_kept() -> None:
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("tune", 1, "/adapters/tune")
    plain, steered = keys(None, lora_request=lora), keys({"push": LATE}, lora_request=lora)
    assert shared(plain, steered) == 2
    assert shared(steered, keys({"push": LATE})) == 0


PROMPT_LENGTHS = [1, 3, 4, 5, 10, 16, 17, 39]
DYNAMIC: list[Any] = [
    "walk:dynamic",
    "push:dynamic",
    {"walk": {"strength": "dynamic", "layers": "2"}},
    {"walk": {"strength": "dynamic"}, "spin": {"strength": "dynamic"}},
    {"walk": {"strength": "dynamic"}, "word": 3, "push": LATE},
    {"walk": {"strength": "dynamic"}, "word": {"strength": "dynamic"}},
]


@pytest.mark.parametrize("prompt_len", PROMPT_LENGTHS)
@pytest.mark.parametrize("steer", DYNAMIC, ids=str)
def test_a_dynamic_request_shares_no_block_from_the_last_prompt_token_on(
    steer: Any, prompt_len: int, block: int
) -> None:
    def of(steer: Any, request_id: str) -> list[bytes]:
        return keys(steer, prompt_len=prompt_len, block=block, request_id=request_id)

    other_keys = [
        of(None, "r"),
        of(steer, "another"),
        stream_keys(steer, None, prompt_len=prompt_len, block=block),
        stream_keys(steer, 0, prompt_len=prompt_len, block=block),
    ]
    for other in other_keys:
        assert shared(of(steer, "r"), other) == (prompt_len - 1) // block
    assert of(steer, "r") == of(steer, "r")  # after a preemption its blocks are found again


def test_a_reused_id_shares_only_blocks_with_the_same_strengths() -> None:
    keys_of_request = keys("walk:dynamic", prompt_len=10)
    for other, prompt_len in [
        ("walk:dynamic:1", 10),
        ("walk:dynamic:2:0.6", 10),
        ({"walk": {"strength": "dynamic", "kl": "authors"}}, 10),
        ({"walk": {"strength": "dynamic", "layers": "0"}}, 10),
        ("walk:dynamic", 11),
        ("step:dynamic", 10),
        ({"walk": 2}, 10),
    ]:
        assert shared(keys_of_request, keys(other, prompt_len=prompt_len)) == 9 // 4


@pytest.mark.parametrize("prompt_len", PROMPT_LENGTHS)
@pytest.mark.parametrize("salt", [None, "mine"])
def test_a_base_has_the_keys_of_an_unsteered_request(prompt_len: int, salt: str | None) -> None:
    steer = {"push": 2, "walk": {"strength": "dynamic"}}
    base = stream_keys(steer, None, prompt_len=prompt_len, salt=salt)
    assert base == keys(None, prompt_len=prompt_len, salt=salt)


@pytest.mark.parametrize("prompt_len", PROMPT_LENGTHS)
def test_equal_probes_share_all_their_blocks(prompt_len: int) -> None:
    """A probe has only its own dose at its maximum: other doses of the request do not change its
    KV.
    """

    def probe(steer: Any, dose: int = 0) -> list[bytes]:
        return stream_keys(steer, dose, prompt_len=prompt_len)

    alone = probe("walk:dynamic:1.5")
    assert shared(alone, keys(None, prompt_len=prompt_len)) == (prompt_len - 1) // 4
    for same in (
        probe("walk:dynamic:1.5:0.9"),
        probe({"walk": {"schedule": "dynamic", "max": 1.5, "kl": "authors"}}),
        probe("push:2,walk:dynamic:1.5", 1),
    ):
        assert same == alone
    for other in ("walk:dynamic:2", "walk:dynamic:-1.5", "step:dynamic:1.5", "push:dynamic:1.5"):
        assert shared(alone, probe(other)) == (prompt_len - 1) // 4


def test_the_probe_of_a_vector_shares_blocks_with_requests_that_use_the_vector_equally() -> None:
    """In phase ``generation`` after a prompt that is one token shorter."""
    assert stream_keys("push:dynamic:2", 0, prompt_len=11) == keys(
        {"push": {"strength": 2, **LATE}}
    )


def test_a_dynamic_dose_at_the_head_does_not_change_the_keys() -> None:
    assert keys("word:dynamic", salt="mine") == keys(None, salt="mine")
    assert keys("word:dynamic,push:2") == keys("push:2")
