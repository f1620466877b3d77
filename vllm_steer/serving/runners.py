"""Thin adapters of vLLM's two model runners to ``SteeredBatch``; methods are wrapped per instance.

Both tell the same three things: a step begins, its rows are these, prompt logprobs are computed
over its tokens. V1: ``execute_model``, ``_prepare_inputs``, ``_get_prompt_logprobs_dict``. V2:
``execute_model``, ``prepare_inputs``, the two methods of ``prompt_logprobs_worker``.
"""

import dis
import functools
import inspect
import itertools
from typing import Any

import numpy as np

from vllm_steer.compat.patching import unknown_behavior, wrap
from vllm_steer.errors import SteerError
from vllm_steer.kernels.upload import upload
from vllm_steer.serving.batch import NewRequest, SteeredBatch
from vllm_steer.serving.dynamic.strengths import PendingStrengths
from vllm_steer.serving.step import Step


def attach_runner(runner: Any, batch: SteeredBatch, *, v2: bool, runs_decoder: bool = True) -> None:
    """Connect a runner. Raises ``SteerError`` if it does not work as this vLLM range does.

    ``runs_decoder`` is false for a worker that only encodes images or audio for other workers: its
    steps take scheduled tokens and run no decoder.
    """
    wrap(runner, "execute_model", functools.partial(_begin, batch, runs_decoder))
    wrap(runner, "execute_model", functools.partial(_attach_strengths, batch))
    wrap(runner, "sample_tokens", functools.partial(_attach_strengths, batch))
    if v2:
        _require_calls(runner, "execute_model", "self.prepare_inputs")
        _require_calls(runner, "sample", "model.compute_logits")
        wrap(runner, "prepare_inputs", functools.partial(_announce_v2, batch))
        wrap(runner, "prepare_inputs", functools.partial(_force_tokens_v2, runner))
        _wrap_prompt_logprobs_v2(runner, batch)
    else:
        _require_calls(runner, "execute_model", "self._prepare_inputs")
        _require_calls(runner, "execute_model", "model.compute_logits")
        wrap(runner, "execute_model", functools.partial(_force_tokens_v1, runner))
        wrap(runner, "_dummy_run", functools.partial(_dummy_run, batch))
        wrap(runner, "_prepare_inputs", functools.partial(_announce_v1, batch, runner))
        wrap(runner, "_get_prompt_logprobs_dict", functools.partial(_prompt_logprobs_v1, batch))


def _begin(
    batch: SteeredBatch,
    runs_decoder: bool,
    original: Any,
    scheduler_output: Any,
    *args: Any,
    **kw: Any,
) -> Any:
    """Start a step, and see after it that its rows were announced.

    A replayed CUDA graph runs no Python of the sites: nothing inside it could notice that it
    replays on the doses of another step.
    """
    if kw.get("dummy_run"):
        batch.begin_dummy_run()
        return original(scheduler_output, *args, **kw)
    batch.begin_step(
        (
            NewRequest(new.req_id, new.sampling_params, _prompt_len(new), new.mm_features)
            for new in scheduler_output.scheduled_new_reqs
        ),
        scheduler_output.finished_req_ids,
        getattr(scheduler_output, "steer_streams", None),
    )
    output = original(scheduler_output, *args, **kw)
    if runs_decoder and scheduler_output.total_num_scheduled_tokens:
        batch.require_announced()
    return output


def _attach_strengths(batch: SteeredBatch, original: Any, *args: Any, **kw: Any) -> Any:
    """Attach the strengths of a step to its output."""
    output = original(*args, **kw)
    if not batch.dynamic.requests or output is None:
        return output
    pending = batch.dynamic.strengths.pop_results()
    if pending is None:
        return output
    if hasattr(output, "get_output"):
        wrap(output, "get_output", functools.partial(_read_with_strengths, pending))
        return output
    return _with_strengths(output, pending)


def _read_with_strengths(pending: PendingStrengths, original: Any) -> Any:
    return _with_strengths(original(), pending)


def _with_strengths(output: Any, pending: PendingStrengths) -> Any:
    output.steer_strengths = pending.read()
    return output


def _force_tokens_v1(
    runner: Any, original: Any, scheduler_output: Any, *args: Any, **kw: Any
) -> Any:
    """Give base and probe streams the main request's token in place of the one they sampled."""
    streams = getattr(scheduler_output, "steer_streams", None)
    for req_id, (count, token) in streams.tokens.items() if streams is not None else ():
        runner.requests[req_id].output_token_ids[count - 1 :] = [token]
    return original(scheduler_output, *args, **kw)


def _force_tokens_v2(
    runner: Any, original: Any, scheduler_output: Any, *args: Any, **kw: Any
) -> Any:
    streams = getattr(scheduler_output, "steer_streams", None)
    if streams is not None and streams.tokens:
        slots = [runner.req_states.req_id_to_index[req_id] for req_id in streams.tokens]
        sampled = runner.req_states.last_sampled_tokens
        indices, tokens = upload(
            [np.array(slots), np.array([token for _, token in streams.tokens.values()])],
            sampled.device,
        )
        sampled[indices, 0] = tokens
    return original(scheduler_output, *args, **kw)


def _prompt_len(new: Any) -> int:
    """Tokens of the request's own prompt, also where it is recomputed with what it generated."""
    ids = new.prompt_token_ids
    return len(ids) if ids is not None else int(new.prompt_embeds.shape[0])


def _dummy_run(batch: SteeredBatch, original: Any, *args: Any, **kw: Any) -> Any:
    batch.begin_dummy_run()
    return original(*args, **kw)


def _announce_v1(
    batch: SteeredBatch,
    runner: Any,
    original: Any,
    scheduler_output: Any,
    num_scheduled_tokens: Any,
    *args: Any,
    **kw: Any,
) -> Any:
    prepared = original(scheduler_output, num_scheduled_tokens, *args, **kw)
    if batch.has_steered_requests:
        drafts = prepared[1]
        num_reqs = len(num_scheduled_tokens)
        logits = np.ones(num_reqs, dtype=np.int64)
        if drafts is not None:
            logits += np.asarray(drafts.num_draft_tokens, dtype=np.int64)
        batch.announce(
            Step(
                req_ids=runner.input_batch.req_ids[:num_reqs],
                logits=logits,
                tokens=num_scheduled_tokens.astype(np.int64),
                query_start_loc=runner.query_start_loc.gpu[: num_reqs + 1],
                positions=runner.positions[: int(num_scheduled_tokens.sum())],
            )
        )
    return prepared


def _prompt_logprobs_v1(
    batch: SteeredBatch, original: Any, hidden_states: Any, *args: Any, **kw: Any
) -> Any:
    with batch.head_rows.over_tokens(hidden_states):
        return original(hidden_states, *args, **kw)


def _announce_v2(batch: SteeredBatch, original: Any, *args: Any, **kw: Any) -> Any:
    input_batch = original(*args, **kw)
    if batch.has_steered_requests:
        num_reqs = len(input_batch.req_ids)
        batch.announce(
            Step(
                req_ids=list(input_batch.req_ids),
                logits=np.diff(input_batch.cu_num_logits_np).astype(np.int64),
                tokens=input_batch.num_scheduled_tokens.astype(np.int64),
                query_start_loc=input_batch.query_start_loc[: num_reqs + 1],
                positions=input_batch.positions[: input_batch.num_tokens],
            )
        )
    return input_batch


def _wrap_prompt_logprobs_v2(runner: Any, batch: SteeredBatch) -> None:
    worker = runner.prompt_logprobs_worker
    if worker is None:
        return
    names = ["compute_prompt_logprobs", "compute_prompt_token_id_logprobs"]
    for name in filter(functools.partial(hasattr, worker), names):
        wrap(worker, name, functools.partial(_prompt_logprobs_v2, batch))


def _prompt_logprobs_v2(
    batch: SteeredBatch, original: Any, logits_fn: Any, hidden_states: Any, *args: Any, **kw: Any
) -> Any:
    with batch.head_rows.over_tokens(hidden_states):
        return original(logits_fn, hidden_states, *args, **kw)


def _require_calls(runner: Any, method: str, call: str) -> None:
    """Check that the runner's code still goes through what is wrapped.

    ``call`` is an attribute and what it is read from: ``self.prepare_inputs`` is not the method
    of that name of another object.
    """
    owner, name = call.split(".")
    code = dis.get_instructions(inspect.unwrap(getattr(type(runner), method)))
    code = (
        instruction for instruction in code if instruction.opname != "EXTENDED_ARG"
    )  # a part of the one after it
    reads = ((_name_read(before), _name_read(after)) for before, after in itertools.pairwise(code))
    if (owner, name) not in reads:
        raise SteerError(unknown_behavior(f"{type(runner).__name__}.{method} calls no {call}"))


def _name_read(instruction: dis.Instruction) -> str | None:
    """The variable or attribute that an instruction reads, of two variables the last one."""
    value = instruction.argval if instruction.opname.startswith("LOAD_") else None
    last = value[-1] if isinstance(value, tuple) and value else value
    return last if isinstance(last, str) else None
