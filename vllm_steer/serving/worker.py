"""A worker with steers: bank after the model is loaded, proof before the engine is ready."""

import functools
import logging
from typing import Any

import torch

from vllm_steer.bank import fill_bank
from vllm_steer.errors import SteerError
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.batch import SteeredBatch
from vllm_steer.serving.engine_config import plan_of
from vllm_steer.serving.head import SteeredHead
from vllm_steer.serving.runners import attach_runner

logger = logging.getLogger("vllm.vllm_steer")


def steer_worker(worker: Any) -> None:
    """Wrap one worker's start-up if its engine has a plan; otherwise leave it as it is.

    The bank is filled when ``load_model`` returns: outside vLLM's pool for model weights, which
    sleep mode may drop, and before the memory profile that sizes the KV cache.
    """
    plan = plan_of(worker.vllm_config)
    if plan is None:
        return
    steering = _WorkerSteering(worker, plan)
    for name, then in (
        ("load_model", steering.after_load),
        ("compile_or_warm_up_model", steering.prove),
    ):
        setattr(worker, name, _followed_by(getattr(worker, name), then))


class _WorkerSteering:
    def __init__(self, worker: Any, plan: SteerPlan) -> None:
        self._worker = worker
        self._plan = plan
        self._head: SteeredHead | None = None

    def after_load(self) -> None:
        """Fill the bank and attach head and runner, on the ranks that have an LM head."""
        from vllm.distributed import get_pp_group

        if not get_pp_group().is_last_rank:
            return
        runner = self._worker.model_runner
        if self._head is None:
            config = self._worker.vllm_config
            steers = {name: planned.load() for name, planned in self._plan.steers.items()}
            bank = fill_bank(steers, dtype=config.model_config.dtype, device=runner.device)
            batch = SteeredBatch(self._plan, runner.device)
            attach_runner(runner, batch, v2=getattr(config, "use_v2_model_runner", False))
            self._head = SteeredHead(bank, batch)
            logger.info(
                "vllm-steer: %d steers in the bank, %.1f MiB", len(steers), bank.num_bytes / 2**20
            )
        self._head.attach(runner.get_model())

    def prove(self) -> None:
        """See that every shelf of the bank was reached through the head as the runner calls it.

        vLLM's warm-up has called it where there is one; else it is called here. Raises
        ``SteerError`` for a shelf that was passed, and the engine does not start.
        """
        if self._head is None:
            return
        if self._head.passed_shelves():
            self._rehearse()
        if passed := self._head.passed_shelves():
            raise SteerError(
                f"the model computes its logits past the steers of its {', '.join(passed)}: "
                "requests would run unsteered; use a vLLM version that vllm-steer is made for"
            )

    def _rehearse(self) -> None:
        assert self._head is not None
        config, runner = self._worker.vllm_config, self._worker.model_runner
        if config.lora_config is not None:
            _select_no_adapter(runner, num_rows=2)
        size = (2, config.model_config.get_hidden_size())
        dtype = config.model_config.dtype
        self._head.batch.rest()
        with torch.inference_mode():
            runner.model.compute_logits(torch.ones(size, dtype=dtype, device=runner.device))


def _select_no_adapter(runner: Any, num_rows: int) -> None:
    """Without a mapping vLLM's LoRA layers would read indices that nobody has written yet."""
    from vllm.lora.layers import LoRAMapping

    none = (0,) * num_rows
    runner.lora_manager.set_active_adapters(set(), LoRAMapping(none, none, is_prefill=True))


def _followed_by(original: Any, then: Any) -> Any:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then()
        return result

    return method
