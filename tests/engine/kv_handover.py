"""A KV connector that moves nothing: it says that a prompt's KV is there for another instance."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)


class HandoverConnector(KVConnectorBase_V1):
    """Answers a finished ``do_remote_decode`` request with parameters for the next instance."""

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        return False

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, Any]:
        asked = request.kv_transfer_params or {}
        if not asked.get("do_remote_decode"):
            return False, None
        return False, {"do_remote_prefill": True, "remote_engine_id": "first"}

    def get_num_new_matched_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, *args: Any) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
