"""PrefixStore: what a prompt begins with is computed once, and then loaded, by whichever process needs it.

    store = kvcomp.PrefixStore("redis://localhost:6379")     # or a folder
    cache = store.load(ids, model)                           # a KVCompCache with as many of the first tokens as are
    stored out = model.generate(ids, past_key_values=cache)
    store.save(out, cache, model)

What is loaded is what was computed for the same tokens by the same weights under the same spec, compressed; a value
that is anything else (damaged, of another key, cut off) counts as none and is removed. What is not protected against is
someone who may write to the store
and means harm: checksums are no signatures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from kvcomp.calibration import Calibration
from kvcomp.errors import CorruptData, InvalidInput, LimitExceeded, UnsupportedModel, UnsupportedVersion
from kvcomp.files.header import Header
from kvcomp.kernels import host_backend
from kvcomp.prefix.chain import CHUNK_PAGES, Origin, books_of, header_of, join_chunks, key_of, pack, storable, unpack
from kvcomp.serve.blobs import TIMEOUT, Buffer, open_blobs
from kvcomp.serve.breaker import drop_damaged
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.tensors import NAMES

if TYPE_CHECKING:
    from kvcomp.integrations.transformers import KVCompCache

CALL_BYTES = 1 << 24  # values of so many bytes travel in one call
BY_LENGTH = (
    "no prefix of so long a prompt is stored or loaded: the rotary frequencies (dynamic, longrope) depend on its length"
)

logger = logging.getLogger("kvcomp")


class PrefixStore:
    """Compressed caches of prompts in a folder or in Redis, chunk by chunk; shared beginnings are there once.

    url: a folder's path or ``file://``, or ``redis://``, ``rediss://``, ``valkey://``, ``valkeys://``, ``unix://``
    (needs redis-py).
    limit: bytes that a folder may hold, None for no limit; the least recently used chunks go first. Redis has its own:
        maxmemory with allkeys-lru.
    timeout: seconds that any one call to Redis may take in all; a call moves some 16 MB, or one chunk if that is
    larger.

    Several processes may use one store at once. ``load`` and ``save`` raise StoreUnavailable if it does not answer in
    time, or refuses.
    """

    def __init__(self, url: str | Path, *, limit: int | None = None, timeout: float = TIMEOUT) -> None:
        self.blobs = open_blobs(url, limit=limit, timeout=timeout)

    def load(
        self,
        ids: Tensor | Sequence[int],
        model: Any,
        spec: str | Path | CodecSpec = "kvcomp",
        *,
        calibration: Calibration | str | Path | None = None,
        model_id: str | None = None,
        backend: str = "cpu",
    ) -> KVCompCache:
        """A cache of the longest stored beginning of a prompt that leaves at least one token to compute; an empty one
        if there is none.

        ids: (tokens,) or (1, tokens), of one prompt without padding. model: a transformers model. spec, calibration: as
        KVCompCache takes them.
        model_id: a name for the model's weights instead of their hash.
        Raises StoreUnavailable, and InvalidInput or UnsupportedModel if such a cache cannot be.
        """
        from kvcomp.integrations.transformers import KVCompCache
        from kvcomp.integrations.transformers.files import give
        from kvcomp.integrations.transformers.models import check_text_only

        check_text_only(model)
        cache = KVCompCache(model.config, spec, calibration=calibration, backend=backend)
        _check_layers(cache)
        origin = _origin(cache, model, model.dtype, model_id)
        tokens = _tokens(ids)
        if cache.session.length_matters(len(tokens)):
            logger.warning(BY_LENGTH)
            return cache
        chunks = self._read(origin, tokens, origin.chunks(len(tokens) - 1), host_backend(backend))
        if chunks:
            for index, layer in enumerate(cache.layers):
                give(layer, join_chunks([stores[index] for stores in chunks]))
        return cache

    def save(self, ids: Tensor | Sequence[int], cache: KVCompCache, model: Any, *, model_id: str | None = None) -> int:
        """Store what is compressed of a cache and not there yet. Returns of how many first tokens it is there now.

        ids: the tokens that the cache was filled with, of one prompt without padding; more may follow. model, model_id:
        as in ``load``.
        Nothing is stored of a cache whose codebooks are not fixed yet, or if another process has just stored the same
        beginning with
        codebooks of its own: whoever loads that goes on from there.
        Raises StoreUnavailable, LimitExceeded if a folder's limit is less than a chunk, and InvalidInput or
        UnsupportedModel.
        """
        from kvcomp.integrations.transformers import KVCompCache
        from kvcomp.integrations.transformers.files import stores_of
        from kvcomp.integrations.transformers.models import check_text_only
        from kvcomp.integrations.transformers.recompute import check_recomputed

        check_text_only(model)
        if not isinstance(cache, KVCompCache):
            raise InvalidInput(f"only a KVCompCache can be stored, not a {type(cache).__name__}")
        tokens = _tokens(ids)
        _check_layers(cache)
        stores = stores_of(cache.layers, cache.spec)
        cache.session.check_from_ids()
        first = stores[0]
        if first.batch != 1 or first.starts[0] or first.tokens > len(tokens):
            raise InvalidInput(
                f"the cache holds {first.batch} rows of {first.tokens} tokens: give one row without padding, and "
                "the tokens it was filled with"
            )
        origin = _origin(cache, model, first.dtype, model_id)
        if cache.session.length_matters(cache.session.longest):
            logger.warning(BY_LENGTH)
            return 0
        count = storable(stores)
        if not count:
            return 0
        hashes = origin.hashes(tokens, count)
        first_key = key_of(hashes[0])
        value = pack(origin, stores, 0, first_key)
        header = header_of(value)
        host = host_backend(cache.compressed_layers[0].backend)
        there = self._open(origin, first_key, self.blobs.get([first_key])[0], 0, host)
        if there is not None and books_of(there[0]) != books_of(header):
            logger.info("another process has stored this beginning first: nothing is added to it")
            return 0
        keys = [key_of(x, books_of(header)) for x in hashes[1:]]
        missing = [chunk for chunk, size in enumerate(self.blobs.sizes(keys), 1) if size is None]
        if there is None or missing:
            check_recomputed(stores, model, tokens, count * CHUNK_PAGES)
        if there is None:
            self.blobs.put([(first_key, value)])
        step = max(1, CALL_BYTES // sum(len(piece) for piece in value))
        for begin in range(0, len(missing), step):
            some = missing[begin : begin + step]
            self.blobs.put([(keys[chunk - 1], pack(origin, stores, chunk, keys[chunk - 1])) for chunk in some])
        return origin.end(count - 1)

    def close(self) -> None:
        """Give back connections; the store connects again if it is used again."""
        self.blobs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, origin: Origin, tokens: list[int], most: int, backend: str) -> list[dict[int, KVStore]]:
        """The layers of the first chunks, as many as there are without a gap."""
        hashes = origin.hashes(tokens, most)
        if not hashes:
            return []
        first_key = key_of(hashes[0])
        first = self._open(origin, first_key, self.blobs.get([first_key])[0], 0, backend)
        if first is None:
            return []
        header, stores = first
        keys = [first_key, *(key_of(x, books_of(header)) for x in hashes[1:])]
        sizes = self.blobs.sizes(keys[1:])
        there = 1 + (sizes.index(None) if None in sizes else len(sizes))
        step = max(1, CALL_BYTES // max([1, *(size or 0 for size in sizes)]))
        found = [stores]
        while len(found) < there:
            some = keys[len(found) : min(len(found) + step, there)]
            for key, value in zip(some, self.blobs.get(some), strict=True):
                opened = self._open(origin, key, value, len(found), backend, books_of(header))
                if opened is None:
                    there = len(found)
                    break
                found.append(opened[1])
        self.blobs.touch(keys[: len(found)])
        return found

    def _open(
        self, origin: Origin, key: str, value: Buffer | None, chunk: int, backend: str, books: bytes | None = None
    ) -> tuple[Header, dict[int, KVStore]] | None:
        """A chunk; None if there is none that can be used. What is damaged is deleted. books: what it must have been
        coded with.
        """
        if value is None:
            return None
        try:
            header, stores = unpack(origin, value, chunk, key, backend)
            if books is not None and books_of(header) != books:
                raise CorruptData("the value has other codebooks than the chunks before it")
            return header, stores
        except (CorruptData, UnsupportedVersion, LimitExceeded) as error:
            logger.warning("a stored prefix is not used: %s", error)
            drop_damaged(self.blobs, key, error)
            return None


def _tokens(ids: Tensor | Sequence[int]) -> list[int]:
    try:
        x = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"ids must be the token ids of one prompt, a tensor or a list of numbers: {error}") from None
    if x.is_floating_point() or x.dtype == torch.bool or x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != 1):
        raise InvalidInput(f"ids must be the token ids of one prompt, (tokens,) or (1, tokens), not {tuple(x.shape)}")
    found: list[int] = x.reshape(-1).tolist()
    if min(found, default=0) < 0:
        raise InvalidInput(f"ids must be token ids from 0, and there is {min(found)}: give them without padding")
    return found


def _check_layers(cache: KVCompCache) -> None:
    others = [index for index, layer in enumerate(cache.layers) if layer not in cache.compressed_layers]
    if others:
        raise UnsupportedModel(
            f"layers {others} are not full attention: of a sliding window only the last tokens are there, so no "
            "chunk of the "
            "earlier ones can be stored; save whole caches with KVCompCache.save"
        )


def _origin(cache: KVCompCache, model: Any, dtype: torch.dtype, model_id: str | None) -> Origin:
    from kvcomp.integrations.transformers.identity import configuration_of, weights_id
    from kvcomp.integrations.transformers.models import text_config

    if dtype not in NAMES:
        raise InvalidInput(f"the model has {dtype}: float32, float16 or bfloat16 are possible")
    configuration = configuration_of(text_config(model.config))
    cache.session.check_configuration(configuration)
    about = {"id": weights_id(model if model_id is None else model_id), "configuration": configuration}
    return Origin(about, len(cache.layers), NAMES[dtype], cache.spec, cache.calibration)
