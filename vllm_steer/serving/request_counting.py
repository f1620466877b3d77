"""Counts the requests of an engine in its frontend, when each of them ends.

What a request asks for is resolved when it enters vLLM's output processor, where its plan's doses
are cached; nothing is done per token, and nothing in the engine core or in a worker.
"""

import logging
from collections.abc import Callable, Container
from typing import Any, Final

from vllm_steer.compat.features import unavailable_reason
from vllm_steer.compat.patching import wrap
from vllm_steer.errors import SteerRequestError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.metrics.labels import OTHER, steer_labels
from vllm_steer.serving.metrics.requests import Status, count_request, prepare_series
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.request_args import doses_of
from vllm_steer.serving.runtime.names import known_names

logger = logging.getLogger("vllm.vllm_steer")

_LABELS: Final = "steer_labels"
_STATUS: Final[dict[str, Status]] = {"ABORT": "aborted", "ERROR": "failed"}
"""By vLLM's finish reason; every other one is ``finished``."""


def with_counted_requests(
    original: Callable[..., None], self: Any, *args: Any, **kwargs: Any
) -> None:
    """``AsyncLLM.__init__`` and ``LLMEngine.__init__`` of an engine whose requests are counted."""
    original(self, *args, **kwargs)
    plan = plan_of(self.vllm_config)
    if plan is not None:
        count_requests(self.output_processor, plan, lambda: known_names(plan))


def count_requests(
    processor: Any, plan: SteerPlan, known: Callable[[], Container[str]] | None = None
) -> None:
    """Count the requests of this output processor from now on.

    ``known`` gives the names of all steers that are counted by name, those of the plan unless it is
    given; it is called for each request. A vLLM that lacks a name that counting needs is served
    without these metrics, with a warning.
    """
    reason = unavailable_reason("metrics")
    if reason is not None:
        logger.warning("vllm-steer: requests are not counted by steer: %s", reason)
        return
    counter = _RequestCounter(processor, plan, known or (lambda: plan.steers))
    wrap(processor, "add_request", counter.add_request)
    wrap(processor, "_update_stats_from_finished", counter.update_stats_from_finished)
    wrap(processor, "abort_requests", counter.abort_requests)
    prepare_series(plan.steers)


class _RequestCounter:
    """The wrappers of one output processor. A request's labels are kept on its state until it is
    counted, once.
    """

    def __init__(
        self, processor: Any, plan: SteerPlan, known: Callable[[], Container[str]]
    ) -> None:
        self._processor = processor
        self._plan = plan
        self._known = known

    def add_request(
        self, original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(request, *args, **kwargs)
        state = self._processor.request_states.get(request.request_id)
        if state is not None and request.sampling_params is not None:
            vars(state).setdefault(_LABELS, self._labels(request.sampling_params))
        return result

    def update_stats_from_finished(
        self, original: Callable[..., Any], state: Any, finish_reason: Any, *args: Any, **kw: Any
    ) -> Any:
        result = original(state, finish_reason, *args, **kw)
        _count(state, _STATUS.get(getattr(finish_reason, "name", ""), "finished"))
        return result

    def abort_requests(
        self, original: Callable[..., list[str]], *args: Any, **kwargs: Any
    ) -> list[str]:
        """Also called for each parent of aborted sequences, inside the call for the parent."""
        states = dict(self._processor.request_states)
        aborted = original(*args, **kwargs)
        for request_id in aborted:
            _count(states.get(request_id), "aborted")
        return aborted

    def _labels(self, sampling_params: Any) -> tuple[str, ...]:
        try:
            return steer_labels(doses_of(sampling_params, self._plan), self._known())
        except SteerRequestError:  # the steer is gone since the request was admitted
            return (OTHER,)


def _count(state: Any, status: Status) -> None:
    labels = None if state is None else vars(state).pop(_LABELS, None)
    if labels is None:
        return
    detokenizer = state.detokenizer
    count_request(
        labels,
        status,
        num_prompt_tokens=0 if state.is_prefilling else state.prompt_len,
        num_generated_tokens=0 if detokenizer is None else detokenizer.num_output_tokens(),
    )
