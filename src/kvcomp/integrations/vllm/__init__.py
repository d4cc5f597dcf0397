"""vLLM: a worker whose cache is compressed, and a connector to a store of compressed prefixes.

``KVCompConnector`` is loaded by vLLM through this module's path, or by its name alone. The worker is
``kvcomp.integrations.vllm.worker.KVCompWorker``.
"""

from __future__ import annotations

from typing import Any

CONNECTOR = "KVCompConnector"


def __getattr__(name: str) -> Any:
    if name != CONNECTOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvcomp.integrations.vllm.connector import KVCompConnector  # it needs vLLM; what is beside it does not

    return KVCompConnector


def register() -> None:
    """Make the connector known to vLLM by its name: the entry point ``vllm.general_plugins``."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    KVConnectorFactory.register_connector(CONNECTOR, __name__, CONNECTOR)
