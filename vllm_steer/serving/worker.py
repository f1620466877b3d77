"""Steering in a worker: fills the banks after the model is loaded, and verifies the sites."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_steer.bank import HeadRoom, LayerRoom, SiteRoom, fill_head_bank
from vllm_steer.compat import options
from vllm_steer.compat.patching import version_advice, wrap
from vllm_steer.environment import always_self_tests
from vllm_steer.errors import SteerError
from vllm_steer.kernels import upload
from vllm_steer.kernels.dispatch import guidance_backend, lm_steer_backend
from vllm_steer.plan import SteerPlan
from vllm_steer.serving.batch import SteeredBatch
from vllm_steer.serving.gates import GATES_PER_REQUEST_SLOT, GateTable
from vllm_steer.serving.head import SteeredHead
from vllm_steer.serving.layers import SteeredLayers, steered_layers
from vllm_steer.serving.model_sites import ModelSites, model_sites
from vllm_steer.serving.plan_agreement import check_ranks
from vllm_steer.serving.plan_transport import plan_of
from vllm_steer.serving.runners import attach_runner
from vllm_steer.serving.runtime.reserved_bank import LOADING, READY, Reply, ReservedBank
from vllm_steer.serving.startup_checks import can_be_dynamic
from vllm_steer.site_report import SiteReport
from vllm_steer.steers import ConditionSteer, LMSteer

logger = logging.getLogger("vllm.vllm_steer")

_UNSTEERED = f"requests would run unsteered; {version_advice()}"


def steer_worker(worker: Any) -> None:
    """Wrap one worker's start-up if its engine has a plan; otherwise leave it as it is.

    Raises ``SteerError`` if another rank has another plan or none.

    The banks are filled when ``load_model`` returns: outside vLLM's pool for model weights, which
    sleep mode may drop, and before the memory profile that sizes the KV cache.
    """
    plan = plan_of(worker.vllm_config)
    if plan is None:
        return
    check_ranks(plan)
    steering = _WorkerSteering(worker, plan)
    worker.steer_sites = steering.steer_sites
    for name in LOADING:
        setattr(worker, name, functools.partial(steering.load_at_run_time, name))
    wrap(worker, "load_model", functools.partial(_call_after, steering.after_load))
    wrap(
        worker,
        "compile_or_warm_up_model",
        functools.partial(_call_after, steering.verify_sites_reached),
    )
    for name in ("reload_weights", "finish_weight_update"):
        wrap(worker, name, functools.partial(_call_after, steering.after_new_weights))


class _WorkerSteering:
    def __init__(self, worker: Any, plan: SteerPlan) -> None:
        self._worker = worker
        self._plan = plan
        self._batch: SteeredBatch | None = None
        self._head: SteeredHead | None = None
        self._layers: SteeredLayers | None = None
        self._num_bytes = 0
        self._sites: ModelSites | None = None
        self._reserved: ReservedBank | None = None

    def steer_sites(self) -> SiteReport | None:
        """What the self-test has found on this rank; None where it did not run."""
        return None if self._sites is None else self._sites.report()

    def after_load(self) -> None:
        """Fill the banks and attach runner, head and layers: what this rank has of them.

        The banks' bytes are added to what the runner says that the model takes. Up to 0.26 vLLM
        sizes its KV cache by that number and by growth after this point, so it would give the
        banks' memory away a second time; later versions read the number for a log line only.
        """
        runner, config = self._worker.model_runner, self._worker.vllm_config
        model = runner.get_model()
        is_first = self._batch is None
        if is_first:
            self._make(model)
        if self._batch is None:
            return
        if self._layers is not None:
            forward_context = options.static_forward_context(config)
            self._layers.attach(model, forward_context, options.num_layers(config))
        if is_first:
            if self._layers is not None:
                self._layers.check(model, config, self._dummy_run, runner.device)
            attach_runner(
                runner,
                self._batch,
                v2=options.use_v2_model_runner(config),
                runs_decoder=not options.encodes_only(config),
            )
        else:
            self.after_new_weights()
        runner.model_memory_usage = getattr(runner, "model_memory_usage", 0) + self._num_bytes
        if self._head is not None:
            self._head.attach(model)

    def after_new_weights(self) -> None:
        """Project what was projected through the old weights again.

        Raises ``SteerError`` if that fails; each step of the runner then raises it, too.
        """
        if self._layers is None:
            return
        runner, config = self._worker.model_runner, self._worker.vllm_config
        try:
            self._layers.project_again(
                runner.get_model(), options.num_layers(config), options.dtype(config)
            )
        except Exception as error:
            message = (
                f"the weights have changed, and the steers at heads cannot follow: {error}; "
                "restart the engine with steers that fit the new weights"
            )
            wrap(runner, "execute_model", functools.partial(_fail, message))
            raise SteerError(message) from error

    def _make(self, model: Any) -> None:
        """Create banks and batch if this rank has a site of a steer."""
        from vllm.distributed.parallel_state import get_pp_group

        config, device = self._worker.vllm_config, self._worker.model_runner.device
        steers = {name: planned.load() for name, planned in self._plan.steers.items()}
        heads = {name: s for name, s in steers.items() if isinstance(s, LMSteer)}
        conditions = {name: s for name, s in steers.items() if isinstance(s, ConditionSteer)}
        inside = {
            name: s for name, s in steers.items() if not isinstance(s, LMSteer | ConditionSteer)
        }
        gates = self._gate_table(device) if self._plan.has_conditions else None
        if self._plan.layer_sites:
            known = model_sites(model, config, self._dummy_run)
            self._sites = known.without_modules()
        elif always_self_tests():
            try:
                self._sites = model_sites(model, config, self._dummy_run).without_modules()
            except SteerError as error:
                logger.warning("vllm-steer: no site inside the layers: %s", error)
        if self._plan.layer_sites:
            inside = {
                name: known.where_present(name, steer)
                if self._plan.steers[name].where_present
                else steer
                for name, steer in inside.items()
            }
            backend = guidance_backend(self._plan.kernels, device)
            tokens = int(options.max_num_batched_tokens(config))
            maps_backend = lm_steer_backend(self._plan.kernels, device, max_rows=tokens)
            self._layers = steered_layers(
                inside,
                config,
                device,
                backend,
                maps_backend,
                max_doses=self._plan.limits.max_steers_per_request,
                known=known,
                room=self._layer_room(known),
                conditions=conditions,
                gates=gates,
            )
        bank = None
        if get_pp_group().is_last_rank:
            bank = fill_head_bank(
                heads, dtype=options.dtype(config), device=device, room=self._head_room()
            )
        if self._plan.runtime.enabled:
            self._reserved = ReservedBank(
                self._plan.loaded,
                bank,
                self._layers,
                self._sites,
                options.dtype(config),
                on_cuda=device.type == "cuda",
            )
            self._reserved.warm_up()
        if bank is None and self._layers is None:
            return
        self._batch = SteeredBatch(
            self._plan,
            device,
            lm_steer_backend(self._plan.kernels, device, max_rows=options.max_logits_rows(config)),
            () if self._layers is None else self._layers.all_sites,
            max_rows=options.max_logits_rows(config),
            gates=gates,
        )
        if bank is not None:
            self._head = SteeredHead(
                bank,
                self._batch.head_rows,
                is_profiled=device.type != "cpu",
                serves_dynamic=can_be_dynamic(config),
            )
        for part in (self._head, self._layers):
            if part is not None:
                part.warm_up(options.dtype(config))
        upload.warm_up(device)
        self._num_bytes = sum(b.num_bytes for b in (bank, self._layers) if b is not None)
        logger.info("vllm-steer: %d steers, %.1f MiB", len(steers), self._num_bytes / 2**20)

    def _gate_table(self, device: torch.device) -> GateTable:
        """Room for the gates of all requests at once, those that wait after a preemption, too."""
        most = int(options.max_num_seqs(self._worker.vllm_config))
        most *= self._plan.limits.max_steers_per_request * GATES_PER_REQUEST_SLOT
        return GateTable(self._plan, device, most)

    def _head_room(self) -> HeadRoom | None:
        """The slots to reserve at the head; None for an engine that loads no steers."""
        runtime, config = self._plan.runtime, self._worker.vllm_config
        if not runtime.enabled:
            return None
        return HeadRoom(
            hidden=runtime.room.lm_steers,
            logits=runtime.room.offsets,
            max_rank=runtime.room.max_rank,
            hidden_size=options.hidden_size(config),
            vocab_size=options.vocab_size(config),
        )

    def _layer_room(self, known: ModelSites) -> LayerRoom | None:
        """The directions to reserve in the layers of this rank."""
        runtime = self._plan.runtime
        if not runtime.enabled:
            return None
        room = runtime.room

        def at_site(site: str) -> SiteRoom:
            layers = known.room_layers(site, room.layers)
            if site == "heads":
                return SiteRoom(layers, steps=room.delta_steps)
            return SiteRoom(
                layers, room.vectors, room.delta_steps, room.low_rank_maps, room.conditions
            )

        return LayerRoom(
            sites={site: at_site(site) for site in room.layer_sites},
            width=options.hidden_size(self._worker.vllm_config),
            modes=frozenset(room.modes),
            max_map_rank=room.max_map_rank,
        )

    def load_at_run_time(self, method: str, *args: Any) -> Reply:
        """One step of loading a steer, see ``ReservedBank``, on this rank."""
        if self._reserved is None:  # a rank without a site of any steer
            return {"state": READY}
        with torch.inference_mode():
            return self._reserved.call(method, args, self._projection)

    def _projection(self) -> Callable[[int, torch.Tensor], torch.Tensor]:
        assert self._layers is not None
        config = self._worker.vllm_config
        return self._layers.projection(
            self._worker.model_runner.get_model(), options.num_layers(config), options.dtype(config)
        )

    def verify_sites_reached(self) -> None:
        """Check that the forward pass has reached every site.

        vLLM's warm-up runs one; where there is none, a dummy run follows here. Raises
        ``SteerError`` for a site that it has not reached, and the engine does not start.
        """
        if self._head is not None:
            if self._head.unreached_tables():
                self._dummy_run_head()
            if unreached := self._head.unreached_tables():
                raise SteerError(
                    "the model computes its logits without calling the hooks of its "
                    f"{', '.join(unreached)}: "
                    f"{_UNSTEERED}"
                )
            self._head.start_serving()
        if self._layers is not None:
            if self._layers.unreached_sites():
                self._dummy_run_layers()
            if unreached := self._layers.unreached_sites():
                raise SteerError(
                    f"the model's forward pass does not reach {', '.join(unreached)}: {_UNSTEERED}"
                )
            self._layers.start_serving()

    def _dummy_run_layers(self) -> None:
        """A dummy run of one token; vLLM has none of its own for an eager model on a CPU."""
        runner = self._worker.model_runner
        if options.use_v2_model_runner(self._worker.vllm_config):
            runner._dummy_run(1, skip_attn=True, is_profile=True)
        else:
            runner._dummy_run(1)

    def _dummy_run(self, num_tokens: int) -> None:
        """A dummy run of the target model without attention, before there is a KV cache."""
        runner = self._worker.model_runner
        v2 = options.use_v2_model_runner(self._worker.vllm_config)
        with _without_drafts(runner, "speculator" if v2 else "speculative_config"):
            if v2:
                runner._dummy_run(num_tokens, skip_attn=True, is_profile=True)
            else:
                runner._dummy_run(num_tokens, is_profile=True)

    def _dummy_run_head(self) -> None:
        assert self._batch is not None
        config, runner = self._worker.vllm_config, self._worker.model_runner
        if options.lora_config(config) is not None:
            _select_no_adapter(runner, num_rows=2)
        size, dtype = (2, options.hidden_size(config)), options.dtype(config)
        self._batch.begin_dummy_run()
        with torch.inference_mode():
            runner.model.compute_logits(torch.ones(size, dtype=dtype, device=runner.device))


@contextmanager
def _without_drafts(runner: Any, name: str) -> Iterator[None]:
    """Keep a runner from running its draft model, which is compiled as it runs first."""
    drafting = getattr(runner, name)
    setattr(runner, name, None)
    try:
        yield
    finally:
        setattr(runner, name, drafting)


def _select_no_adapter(runner: Any, num_rows: int) -> None:
    """Set an empty LoRA mapping: vLLM's LoRA layers would read uninitialized indices otherwise."""
    from vllm.lora.layers import LoRAMapping

    none = (0,) * num_rows
    runner.lora_manager.set_active_adapters(set(), LoRAMapping(none, none, is_prefill=True))


def _call_after(act: Callable[[], None], original: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    act()
    return result


def _fail(message: str, *_args: Any, **_kwargs: Any) -> Any:
    raise SteerError(message)
