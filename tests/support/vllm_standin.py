"""What the connector needs of vLLM 0.32, written from its published interface, for tests where vLLM is not installed.

``importable`` puts it under vLLM's names. The abstract methods, their parameters and the attributes that the base class
sets are those of ``KVConnectorBase_V1``; a test holds them against the real class where there is one.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class KVConnectorRole(Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(ABC):  # noqa: B024
    """Base of what the scheduler tells the workers."""


class KVConnectorBase_V1(ABC):
    """The methods that a connector must have, and those that keep the metadata of a step."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self._connector_metadata: KVConnectorMetadata | None = None
        self._vllm_config = vllm_config
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._kv_cache_config = kv_cache_config
        self._role = role

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def _get_connector_metadata(self) -> KVConnectorMetadata:
        assert self._connector_metadata is not None
        return self._connector_metadata

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None: ...  # noqa: B027

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def reset_cache(self) -> bool | None:
        return None

    def shutdown(self) -> None: ...  # noqa: B027

    @abstractmethod
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_name: str) -> None: ...

    @abstractmethod
    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def wait_for_save(self) -> None: ...

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]: ...

    @abstractmethod
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata: ...


INSTALLED = find_spec("vllm") is not None


@contextmanager
def importable() -> Iterator[None]:
    """Make the stand-in what an import of vLLM finds, unless vLLM is there. Afterwards nothing else finds it."""
    if INSTALLED:
        yield
        return
    names = ["vllm", "vllm.logger"]
    for part in ("distributed", "kv_transfer", "kv_connector", "v1", "base"):
        names.append(f"{names[-1] if part != 'distributed' else 'vllm'}.{part}")
    modules = {name: ModuleType(name) for name in names}
    modules["vllm.logger"].__dict__["init_logger"] = logging.getLogger
    modules[names[-1]].__dict__.update(
        KVConnectorBase_V1=KVConnectorBase_V1, KVConnectorMetadata=KVConnectorMetadata, KVConnectorRole=KVConnectorRole
    )
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
