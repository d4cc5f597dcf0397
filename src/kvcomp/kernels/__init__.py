"""Kernels. Every backend is a module with the functions of ``Backend``."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from kvcomp.codec.quantise import Quantised
from kvcomp.errors import BackendUnavailable
from kvcomp.kernels.folding import Folding
from kvcomp.kernels.view import NO_STEPS, Array, Books, CacheView, Steps
from kvcomp.spec import Coding, Kind, Unit

__all__ = ["NO_STEPS", "Array", "Backend", "Books", "CacheView", "Folding", "Steps", "host_backend", "load_backend"]


class Backend(Protocol):
    """What a backend can do; all give the same bytes as ``kvcomp.kernels.reference``."""

    def quantise(self, x: Array, unit: Unit, scale: float | tuple[float, ...]) -> Quantised:
        """``kvcomp.codec.quantise.quantise``."""

    def count_pairs(self, q: Quantised, kind: Kind, classes: int) -> npt.NDArray[np.uint64]:
        """How often each pair of codes occurs in the blocks that are not raw: (classes, 256, 256)."""

    def encode_pages(
        self,
        k: Array,
        v: Array,
        kq: Quantised,
        vq: Quantised,
        coding: tuple[Coding, Coding],
        units: tuple[Unit, Unit],
        k_books: Books,
        v_books: Books,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Encode pages of K and V (docs/format.md, sections 2 to 5).

        Parameters
        ----------
        k, v
            The values, (heads, 64*pages, channels) each; those of V may have other channels than those of K.
        kq, vq
            The same, quantised.
        coding
            Of K and V. Where neither book covers a block, ``huffman`` falls back to a fixed width.
        units
            Of K and V.
        k_books, v_books
            The default book and the sequence's own; None for one that does not exist.

        Returns
        -------
        pages
            The bytes, with as many spare bytes after the last page as a head has channels.
        offsets
            (pages + 1,): where each page begins, and the end of the last.
        """

    def decompress(
        self,
        pages: npt.NDArray[np.int64],
        units: tuple[Unit, Unit],
        k_books: Books,
        v_books: Books,
        out_k: Array,
        out_v: Array,
        steps: Steps = NO_STEPS,
    ) -> None:
        """Decode pages to values, rounded to their dtype.

        Parameters
        ----------
        pages
            (pages,): addresses.
        units
            Of K and V.
        k_books, v_books
            The default book and the sequence's own.
        out_k, out_v
            (heads, 64*pages, channels of K or V) of the dtype, filled.
        steps
            Of the heads, for K and V, where the unit is ``head``.

        Raises
        ------
        InvalidInput
            If the values' dtype is none of the three.
        CorruptData
            From the reference alone, which trusts no page; compiled kernels take pages that are checked.
        """

    def write_raw(
        self, pages: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], k: Array, v: Array, units: tuple[Unit, Unit]
    ) -> None:
        """Write tokens into pages all of whose blocks are raw.

        Parameters
        ----------
        pages
            (tokens,): address of the page of each token, whose directory is written.
        offsets
            (tokens,): its place in the page.
        k, v
            (tokens, heads, channels).
        units
            Of K and V: pages have room for the scales of tokens.
        """

    def attend(
        self,
        q: npt.NDArray[np.float32],
        view: CacheView,
        tail_end: npt.NDArray[np.int64],
        scaling: float,
        softcap: float = 0.0,
        threads: int = 1,
        folding: Folding | None = None,
        hidden: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """softmax(cap(scaling q.K)) V over sinks, pages and tail; KVComp's Fetch (arXiv 2509.00579).

        Parameters
        ----------
        q
            float32 (rows, KV heads, queries of a KV head, channels of K).
        view
            What the queries see.
        tail_end
            int64 (queries,): query i sees the tail up to ``tail_end[i]``.
        scaling
            Factor on q.K.
        softcap
            cap(x) = softcap tanh(x / softcap); 0 for none.
        threads
            Most threads to use. The result does not depend on it.
        folding
            Where K and V are held in other coordinates than the queries have: what leads to them and back. A row's
            tokens have the places 0, 1, 2, .., the sinks first.
        hidden
            int64 (rows, queries of a KV head): how many of its row's first tokens a query does not see, as a sliding
            window has left them; none if None. With each token they are more, so they are no part of the view.

        Returns
        -------
        out, lse
            The output, (rows, KV heads, queries, channels of V), and the natural logarithm of the softmax denominators,
            (rows, KV heads, queries).
            A query that sees no token gets 0 and -inf.

        Raises
        ------
        InvalidInput
            If the values' dtype is none of the three.
        """


def host_backend(name: str) -> str:
    """Name the backend of stores in main memory: those of ``gpu`` wait there until their device is known."""
    return "cpu" if name == "gpu" else name


def load_backend(name: str) -> Backend:
    """Import the backend of this name, ``cpu`` or ``reference``. Raises BackendUnavailable for any other."""
    if name not in ("cpu", "reference"):
        raise BackendUnavailable(f"there is no backend {name!r}: use 'cpu', or 'reference' to check against it")
    module = "kvcomp.kernels.cpu.backend" if name == "cpu" else "kvcomp.kernels.reference"
    return cast(Backend, import_module(module))
