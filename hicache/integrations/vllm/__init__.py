"""vLLM's prefix cache in a sidecar: ``HiCacheConnector``, a V1 KV connector.

    vllm serve MODEL --kv-transfer-config '{
        "kv_connector": "HiCacheConnector", "kv_connector_module_path": "hicache.integrations.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"endpoint": "unix:///run/hicache.sock"}}'

Only ``connector`` and ``engine`` know vLLM; importing this package needs neither vLLM nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hicache.integrations.vllm.connector import HiCacheConnector as HiCacheConnector

__all__ = ["HiCacheConnector"]


def __getattr__(name: str) -> object:
    if name == "HiCacheConnector":
        from hicache.integrations.vllm.connector import HiCacheConnector

        return HiCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
