"""Store: what one layer's cache is to everyone else, on whatever device it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomp.calibration.transform import Transform
from kvcomp.spec import CodecSpec
from kvcomp.store.memory import Memory
from kvcomp.store.padding import Padding

if TYPE_CHECKING:
    from kvcomp.store.cpu import KVStore


class Store(Protocol):
    """The K and V of one layer, compressed as they grow; ``kvcomp.store.new_store`` makes one."""

    spec: CodecSpec
    """The spec of the layer."""
    tokens: int
    """Positions held, left padding included."""
    batch: int
    """Rows; 0 before the first append."""
    heads: int
    """KV heads."""
    channels: int
    """head_dim of queries and K."""
    dtype: torch.dtype
    """Of K and V."""
    sliding_window: int | None
    """A token sees so many of the last ones, itself included; None for all."""
    device: torch.device
    """Where the cache lies."""

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """(rows,) position of each row's first real token."""

    @property
    def transform(self) -> Transform | Padding | None:
        """What K and V pass before they are held."""

    @property
    def value_channels(self) -> int:
        """head_dim of V."""

    @property
    def held_channels(self) -> tuple[int, int]:
        """Channels of K and V as they are held, with padding."""

    @property
    def compressed(self) -> bool:
        """Whether any row has a sealed page."""

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens at the end, raw until ``seal``: (batch, KV heads, new tokens, head_dim) each."""

    def set_starts(self, starts: Sequence[int]) -> None:
        """Say at which position each row's real tokens begin."""

    def seal(self) -> None:
        """Compress every whole page of tokens beyond the window. What is sealed never changes."""

    def step(self) -> None:
        """Do what the host has to do next about pages that the device is compressing."""

    def drain(self) -> None:
        """Do all that the host has to do about pages that the device is compressing."""

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` positions."""

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Make the batch of these rows, which may repeat; sealed pages are shared."""

    def join(self, others: Sequence[Self], tokens: int | None = None) -> Self:
        """One batch of these rows and those of other stores; pages are shared, rows get padding on the left."""

    def can_attend(self, queries: int) -> bool:
        """Whether fused attention can take this many of the last tokens' queries."""

    def attend(self, q: Tensor, scaling: float, softcap: float = 0.0, sink_logits: Tensor | None = None) -> Tensor:
        """Fused attention: ``kvcomp.store.attention.attend`` with what ``can_attend``."""

    def tiles(self, row: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A row's tokens in order: position of the first, and K and V as held, (KV heads, tokens, head_dim) each."""

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V as attention sees them, (batch, KV heads, tokens, head_dim); padding is 0 once a row is sealed."""

    def until_seal(self) -> int:
        """Tokens until a row compresses a page; 1 where only the device knows."""

    def memory(self) -> Memory:
        """Bytes by part."""

    def to_gpu(self, device: torch.device) -> Store:
        """The same cache in the memory of a GPU."""

    def to_main_memory(self) -> KVStore:
        """The same cache in main memory, for files."""
