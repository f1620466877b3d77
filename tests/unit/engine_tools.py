"""An engine's configuration, as the plugin's checks see it."""

from types import SimpleNamespace
from typing import Any


def fake_config(plan: Any, **changed: Any) -> Any:
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(
            runner_type="generate",
            model="org/model",
            get_hidden_size=lambda: 6,
            get_vocab_size=lambda: 11,
        ),
        "device_config": SimpleNamespace(device_type="cpu"),
        "parallel_config": SimpleNamespace(
            prefill_context_parallel_size=1,
            use_ubatching=False,
            enable_batch_sharded_sampling=False,
        ),
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "speculative_config": None,
    }
    for path, value in changed.items():
        part, _, field = path.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    return SimpleNamespace(additional_config={"steer": plan.to_json()}, **parts)
