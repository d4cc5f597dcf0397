"""vLLM: a worker whose cache is compressed, and a connector to a store of compressed prefixes.

``KVCompConnector`` is loaded by vLLM through this module's path. The worker is ``kvcomp.integrations.vllm.worker``'s.
"""

from kvcomp.integrations.vllm.connector import KVCompConnector, Transfers

__all__ = ["KVCompConnector", "Transfers"]
