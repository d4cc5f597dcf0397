"""K and V tensors without a model: compress, decompress, attend, save, load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp import files
from kvcomp.calibration import Calibration, resolve
from kvcomp.calibration.transform import Transform, logit_bound, value_bound
from kvcomp.errors import InvalidInput
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore, Memory, sealed
from kvcomp.store.attention import attend
from kvcomp.store.checks import check_expansion, check_tensor
from kvcomp.store.places import places as token_places


class Place(NamedTuple):
    """Where in a model a layer is: the whole model's spec, the layer's index, and how many layers the model has."""

    spec: CodecSpec
    layer: int
    layers: int


class CompressedKV:
    """Compressed K and V of one layer, made by ``compress`` or ``load``.

    Examples
    --------
    >>> import torch, kvcomp
    >>> compressed = kvcomp.compress(*torch.randn(2, 1, 2, 256, 64))
    >>> compressed.attend(torch.randn(1, 8, 1, 64)).shape
    torch.Size([1, 8, 1, 64])
    """

    def __init__(self, store: KVStore, place: Place | None = None) -> None:
        self._store = store
        self._place = place or Place(store.spec, 0, 1)

    def decompress(self) -> tuple[Tensor, Tensor]:
        """K and V, each (batch, KV heads, tokens, head_dim), in the dtype they came in and within the spec's bound.

        Raises LimitExceeded for a file that is padding, and would take thousands of times its memory.
        """
        check_expansion([self._store])
        return self._store.dense()

    def attend(self, q: Tensor, scaling: float | None = None, softcap: float = 0.0) -> Tensor:
        """softmax(scaling q.K) V, decoding block by block (arXiv 2509.00579, "Fetch").

        Parameters
        ----------
        q
            (batch, heads, queries, head_dim): the queries of the last tokens. Each sees what is not after it.
        scaling
            Factor on q.K; head_dim^-0.5 if None.
        softcap
            Scores become softcap * tanh(score / softcap); 0 for none.

        Returns
        -------
        Tensor
            (batch, heads, queries, head_dim of V) in q's dtype.

        Raises
        ------
        InvalidInput
            If q does not fit.
        """
        return attend(self._store, q, self._store.channels**-0.5 if scaling is None else scaling, softcap)

    def logit_bound(self, q: Tensor, scaling: float | None = None) -> Tensor:
        """A certificate: how far each logit scaling q.(k - mean) lies, at most, from that of the uncompressed k.

        Parameters
        ----------
        q
            (batch, heads, queries, head_dim).
        scaling
            Factor of the logits; head_dim^-0.5 if None.

        Returns
        -------
        Tensor
            float32 (batch, heads, queries, tokens).

        Raises
        ------
        InvalidInput
            Unless compressed with a calibration, or if q does not fit. Without one the spec's own bound holds: no value
            is off by more than half a step.

        Examples
        --------
        >>> bound = compressed.logit_bound(q)              # doctest: +SKIP
        >>> sure = logits[..., 0] - bound[..., 0] > logits[..., 1] + bound[..., 1]   # doctest: +SKIP
        """
        store, transform = self._store, self._certified()
        check_tensor("q", q)
        if q.ndim != 4 or (q.shape[0], q.shape[3]) != (store.batch, store.channels) or q.shape[1] % store.heads:
            raise InvalidInput(
                f"q must be ({store.batch}, a multiple of {store.heads}, queries, {store.channels}), "
                f"not {tuple(q.shape)}"
            )
        scaling = store.channels**-0.5 if scaling is None else scaling
        return logit_bound(q, store.held()[0], torch.tensor(store.steps[0]), transform, scaling)

    def value_bound(self) -> tuple[Tensor, Tensor]:
        """A certificate: how far each value of K and V that ``decompress`` gives is off, at most.

        Returns
        -------
        k, v
            float32 (batch, KV heads, tokens, head_dim) each.

        Raises
        ------
        InvalidInput
            Unless compressed with a calibration.
        """
        transform, steps = self._certified(), self._store.steps
        (k, v), (k_steps, v_steps) = self._store.held(), (torch.tensor(of_kind) for of_kind in steps)
        places = token_places(self._store, 0, self._store.tokens)
        return (
            value_bound(k, k_steps, transform.key, places),
            value_bound(v, v_steps, transform.value),
        )

    def _certified(self) -> Transform:
        """The transform. Raises InvalidInput if there is none."""
        if not isinstance(self._store.transform, Transform):
            raise InvalidInput("certificates need a calibration: compress with kvcomp-klt or packed-klt, and one")
        return self._store.transform

    def memory(self) -> Memory:
        """Bytes by part."""
        return self._store.memory()

    def save(self, path: str | Path) -> None:
        """Write a .kvc file for ``kvcomp.load``. It replaces what was there.

        Raises InvalidInput for a folder, a pipe or an empty path, and OSError.
        """
        spec, layer, layers = self._place
        files.save(path, {layer: self._store}, spec, layers)


def compress(
    k: Tensor,
    v: Tensor,
    spec: str | Path | CodecSpec = "kvcomp",
    backend: str = "cpu",
    calibration: Calibration | str | Path | None = None,
    layer: int = 0,
) -> CompressedKV:
    """Compress K and V of one layer: every whole page of 64 tokens. What is left at the end stays raw.

    Parameters
    ----------
    k, v
        (batch, KV heads, tokens, head_dim) each, float32, float16 or bfloat16, on the CPU. V may have another head_dim
        than K; both are multiples of 8 up to 512.
    spec
        A preset's name, the path of a JSON file, or a CodecSpec. Its window and sinks are not used.
    backend
        ``cpu``, or ``reference`` to check against it.
    calibration
        Of the model, for the presets ``kvcomp-klt`` and ``packed-klt``.
    layer
        With a calibration: which layer of the model K and V are of.

    Raises
    ------
    InvalidInput
        For tensors of another shape or dtype, an unknown spec, or a calibration that is missing or does not fit.
    BackendUnavailable
        If there is no such backend, or K and V are on another device.
    CorruptData, UnsupportedVersion, LimitExceeded
        If the calibration's file is damaged, newer or too large, or the spec's is newer.
    """
    if not isinstance(layer, int) or layer < 0:
        raise InvalidInput(f"layer must be a layer's number from 0, not {layer!r}")
    resolved, read = resolve(spec, calibration)
    bare = resolved.bare()
    if read is not None:
        place = Place(bare, layer, read.about.layers)
        calibrated = read.layer(layer, bare)
        if calibrated is None:
            raise InvalidInput(f"the calibration has no layer {layer}: give layer=, the one that K and V are of")
        return CompressedKV(sealed(bare.layer(layer, place.layers), k, v, backend, calibrated), place)
    if not {resolved.key.layers, resolved.value.layers} <= {None, 1}:
        raise InvalidInput(
            "this spec has scales or steps for each layer of a model: give CodecSpec.layer(i, layers) for one layer's "
            "tensors"
        )
    return CompressedKV(sealed(bare, k, v, backend))


def load(
    path: str | Path,
    layer: int | None = None,
    rows: Sequence[int] | None = None,
    tokens: int | None = None,
    backend: str = "cpu",
    calibration: Calibration | str | Path | None = None,
) -> CompressedKV:
    """Read one layer of a .kvc file without decoding anything. Nobody may write into the file meanwhile.

    Parameters
    ----------
    path
        The file.
    layer
        Which layer; the only one if None.
    rows
        Which rows of the batch; all if None.
    tokens
        How many of the first tokens; all if None.
    backend
        As for ``compress``.
    calibration
        The one that the layer was compressed with, if with any.

    Raises
    ------
    CorruptData, UnsupportedVersion, LimitExceeded, OSError
        If the file, or the calibration's, is damaged, newer, too large, or cannot be read.
    InvalidInput
        If the path names no file, or the file does not hold what is asked for.
    BackendUnavailable
        If there is no such backend.
    """
    container = files.open_container(path)
    if layer is None:
        if len(container.header.layers) != 1:
            raise InvalidInput(f"the file holds {len(container.header.layers)} layers: say which one with layer=")
        layer = container.header.layers[0].layer
    spec, read = resolve(container.header.spec, calibration)
    store = files.load(container, backend, [layer], rows, tokens, read)[layer]
    return CompressedKV(store, Place(spec, layer, container.header.model_layers) if read else None)
