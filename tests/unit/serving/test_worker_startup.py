"""The worker after its model is loaded, and the checks of its runner."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.distributed.parallel_state
from guidance import vector
from torch import nn

from vllm_steer import DeltaSteer, SteerConfig, SteerError, save_steer
from vllm_steer.compat.options import encodes_only
from vllm_steer.families import Family
from vllm_steer.plan import SteerPlan
from vllm_steer.serving import layers as serving_layers
from vllm_steer.serving import worker as serving_worker
from vllm_steer.serving.model_sites import ModelSites
from vllm_steer.serving.runners import attach_runner
from vllm_steer.serving.worker import steer_worker

WIDTH, VOCAB, LAYERS = 16, 11, 2


class Model(nn.Module):
    """A head, and layers that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ torch.ones(WIDTH, VOCAB)


class ModelState:
    """Of another object, a method of the name that the V2 runner's own has."""

    def prepare_inputs(self, batch: Any) -> None:
        pass


class V2Runner:
    """The methods of vLLM's V2 runner that are wrapped, calling each other as there."""

    prompt_logprobs_worker = None
    device = torch.device("cpu")
    model_memory_usage = 0

    def __init__(self) -> None:
        self.model = Model()
        self.model_state = ModelState()
        self.req_states = SimpleNamespace(req_id_to_index={}, last_sampled_tokens=None)

    def get_model(self) -> Model:
        return self.model

    def load_model(self) -> None:
        self.model_memory_usage = 100

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> Any:
        batch = self.prepare_inputs(scheduler_output)
        self.model_state.prepare_inputs(batch)
        return batch

    def prepare_inputs(self, scheduler_output: Any) -> Any:
        ids = list(scheduler_output.num_scheduled_tokens)
        counts = np.array(list(scheduler_output.num_scheduled_tokens.values()))
        return SimpleNamespace(
            req_ids=ids,
            cu_num_logits_np=np.arange(len(ids) + 1),
            num_scheduled_tokens=counts,
            num_tokens=int(counts.sum()),
            query_start_loc=torch.from_numpy(np.cumsum([0, *counts])),
            positions=torch.arange(int(counts.sum())),
        )

    def sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.model.compute_logits(hidden_states)

    def sample_tokens(self) -> None:
        pass


class PreparesElsewhere(V2Runner):
    """Only the model's state is used: the runner's own method is not called."""

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> Any:
        self.model_state.prepare_inputs(scheduler_output)


class SometimesPreparesElsewhere(V2Runner):
    """The call is still there and not always made, as a later vLLM might do under graph replay."""

    prepares = True

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> Any:
        return self.prepare_inputs(scheduler_output) if self.prepares else None


@pytest.fixture
def plan(tmp_path: Path, make_steer: Any) -> SteerPlan:
    """An LM-Steer and a vector in every layer, in files."""
    steers = {
        "word": make_steer(rank=3, columns=1, hidden_size=WIDTH),
        "push": vector((0, 1), width=WIDTH),
    }
    for name, steer in steers.items():
        save_steer(steer, tmp_path / f"{name}.safetensors")
    paths = {name: {"path": str(tmp_path / f"{name}.safetensors")} for name in steers}
    return SteerPlan.of(SteerConfig.load({"steers": paths}))


def worker_of(plan: SteerPlan, runner: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker with a plan, wrapped as the plugin wraps it."""
    stage = SimpleNamespace(is_last_rank=True)
    monkeypatch.setattr(vllm.distributed.parallel_state, "get_pp_group", lambda: stage)
    layers = runner.model.model.layers
    known = ModelSites(layers, dict.fromkeys(range(LAYERS), Family()), {})
    monkeypatch.setattr(serving_worker, "model_sites", lambda *args: known)
    for method in ("attach", "check"):
        monkeypatch.setattr(serving_layers.SteeredLayers, method, lambda *args: None)
    config = SimpleNamespace(
        additional_config={"steer": plan.to_json()},
        use_v2_model_runner=True,
        speculative_config=None,
        ec_transfer_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=32),
        compilation_config=SimpleNamespace(
            static_forward_context={}, max_cudagraph_capture_size=None
        ),
        model_config=SimpleNamespace(
            dtype=torch.float32,
            hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
            hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS),
        ),
    )
    worker = SimpleNamespace(
        vllm_config=config,
        model_runner=runner,
        load_model=runner.load_model,
        compile_or_warm_up_model=lambda: None,
        reload_weights=lambda: None,
        finish_weight_update=lambda: None,
    )
    steer_worker(worker)
    return worker


def scheduled(**tokens: int) -> Any:
    """A step of these requests, all of them new and steered."""
    params = SimpleNamespace(extra_args={"steer": "word:2"})
    new = [
        SimpleNamespace(
            req_id=name, sampling_params=params, prompt_token_ids=[0] * count, mm_features=[]
        )
        for name, count in tokens.items()
    ]
    return SimpleNamespace(
        scheduled_new_reqs=new,
        finished_req_ids=set(),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )


def test_the_banks_count_as_model_memory_on_every_load(
    plan: SteerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = V2Runner()
    worker = worker_of(plan, runner, monkeypatch)
    padded = 512  # tokens of the site's map
    low_rank = 2 * 3 * WIDTH * 4
    directions = LAYERS * 2 * WIDTH * 4
    token_map = 4 * padded * 4 + LAYERS * 4 * padded * 4
    for _ in range(2):
        worker.load_model()
        assert runner.model_memory_usage == 100 + low_rank + directions + token_map


class AttentionModel(Model):
    """Layers with an attention that has an output projection."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.model.layers:
            layer.self_attn = nn.Module()
            layer.self_attn.o_proj = nn.Linear(WIDTH, WIDTH)


@pytest.fixture
def heads_plan(tmp_path: Path) -> tuple[SteerPlan, torch.Tensor]:
    """A delta at ``heads`` of layer 1, and its values ``[steps, width]``."""
    values = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    save_steer(DeltaSteer(delta=values, layers=(1,), site="heads"), tmp_path / "d.safetensors")
    config = {"steers": {"d": {"path": str(tmp_path / "d.safetensors")}}}
    return SteerPlan.of(SteerConfig.load(config)), values[:, 0]


def heads_worker(plan: SteerPlan, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[Any]]:
    """A loaded worker, the projection of layer 1, and the tables of its sites."""
    tables: list[Any] = []
    make = serving_layers.SteeredSite

    def keep_table(table: Any, *args: Any, **kwargs: Any) -> Any:
        tables.append(table)
        return make(table, *args, **kwargs)

    monkeypatch.setattr(serving_layers, "SteeredSite", keep_table)
    runner = V2Runner()
    runner.model = AttentionModel()
    worker = worker_of(plan, runner, monkeypatch)
    worker.load_model()
    layer: Any = runner.model.model.layers[1]
    return worker, layer.self_attn.o_proj, tables


@pytest.mark.parametrize("road", ["reload_weights", "finish_weight_update", "load_model"])
def test_directions_at_heads_follow_new_weights_in_the_same_buffer(
    heads_plan: tuple[SteerPlan, torch.Tensor], monkeypatch: pytest.MonkeyPatch, road: str
) -> None:
    plan, delta = heads_plan
    worker, projection, (table,) = heads_worker(plan, monkeypatch)
    address = table.directions.vectors.data_ptr()
    for scale in (1.0, -2.0):
        with torch.no_grad():
            projection.weight.copy_(scale * torch.eye(WIDTH))
            projection.bias.fill_(scale)
        getattr(worker, road)()
        torch.testing.assert_close(table.directions.vectors[0, 1:], scale * delta)
    assert not table.directions.vectors[0, 0].any()
    assert table.directions.vectors.data_ptr() == address


def test_new_weights_that_the_directions_cannot_follow_stop_the_engine(
    heads_plan: tuple[SteerPlan, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, projection, _ = heads_worker(heads_plan[0], monkeypatch)
    with torch.no_grad():
        projection.weight.fill_(torch.inf)
    message = "the weights have changed, and the steers at heads cannot follow: steer d has values"
    with pytest.raises(SteerError, match=message):
        worker.reload_weights()
    with pytest.raises(SteerError, match=message):
        worker.model_runner.execute_model(scheduled())


def test_a_step_that_bypasses_the_wrapped_input_preparation_is_an_error(
    plan: SteerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replayed graph runs no site's Python: only the runner's own step can tell."""
    runner = SometimesPreparesElsewhere()
    worker_of(plan, runner, monkeypatch).load_model()
    runner.execute_model(scheduled(a=3))
    runner.prepares = False
    runner.execute_model(scheduled())  # a step without tokens prepares nothing
    with pytest.raises(RuntimeError, match="a step with steered requests ran without its rows"):
        runner.execute_model(scheduled(b=2))
    runner.prepares = True
    runner.execute_model(scheduled(c=2))
    runner.prepares = False
    runner.execute_model(scheduled(d=1), dummy_run=True)


def test_a_method_of_the_same_name_on_another_object_is_ignored(
    plan: SteerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(plan, PreparesElsewhere(), monkeypatch)
    with pytest.raises(
        SteerError, match=r"PreparesElsewhere.execute_model calls no self.prepare_inputs"
    ):
        worker.load_model()


def test_all_calls_of_a_method_with_many_names_are_found(
    plan: SteerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the 128th name on Python puts an instruction between the two that are looked for."""
    lines = [f"    self.n{i} = {i}" for i in range(300)]
    values: dict[str, Any] = {}
    head = "def method(self, given, dummy_run=False):"
    exec("\n".join([head, *lines, "    return self.prepare_inputs(given)"]), values)
    runner = type("Many", (V2Runner,), {"execute_model": values["method"]})()
    worker_of(plan, runner, monkeypatch).load_model()
    assert "prepare_inputs" in vars(runner)


def test_an_encoder_only_worker_need_not_announce_its_steps(
    plan: SteerPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SometimesPreparesElsewhere()
    worker = worker_of(plan, runner, monkeypatch)
    worker.vllm_config.ec_transfer_config = SimpleNamespace(
        is_ec_producer=True, is_ec_consumer=False
    )
    assert encodes_only(worker.vllm_config)
    worker.load_model()
    runner.prepares = False
    runner.execute_model(scheduled(a=2))


@pytest.mark.parametrize("both", [True, False])
def test_an_engine_that_also_decodes_is_not_encoder_only(both: bool) -> None:
    transfer = SimpleNamespace(is_ec_producer=both, is_ec_consumer=True)
    assert not encodes_only(SimpleNamespace(ec_transfer_config=transfer))
    assert not encodes_only(SimpleNamespace(ec_transfer_config=None))


def test_the_runners_of_this_vllm_call_the_wrapped_methods() -> None:
    """Their own classes, at the installed version: attaching reads their code."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1

    batch: Any = SimpleNamespace()
    for runner_class, v2 in ((V1, False), (V2, True)):
        runner = object.__new__(runner_class)
        runner.prompt_logprobs_worker = None
        attach_runner(runner, batch, v2=v2)
        assert "prepare_inputs" in runner.__dict__ or "_prepare_inputs" in runner.__dict__
