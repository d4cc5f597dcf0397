"""PrefixStore: what a prompt begins with is computed once, and then loaded, by whichever process needs it.

    store = kvcomp.PrefixStore("redis://localhost:6379")     # or a folder
    cache = store.load(ids, model)                # a KVCompCache with as many of the first tokens as are stored
    store.prefill(ids, cache, model)              # needed where a model has sliding windows or linear attention
    out = model.generate(ids, past_key_values=cache)
    store.save(out, cache, model)

What is loaded is what was computed for the same tokens by the same weights under the same spec, compressed. A value
that is anything else (damaged, of another key, cut off) counts as none and is removed. Nothing protects against someone
who may write to the store and means harm: checksums are no signatures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from kvcomp.calibration import Calibration
from kvcomp.errors import InvalidInput, LimitExceeded, UnsupportedModel
from kvcomp.kernels import host_backend
from kvcomp.prefix.chain import (
    CHUNK_PAGES,
    Origin,
    books_of,
    header_of,
    join_chunks,
    key_of,
    pack,
    storable,
    whole_pages,
)
from kvcomp.prefix.read import CALL_BYTES, Chain, open_chunk
from kvcomp.prefix.state import State, pack_state, state_of
from kvcomp.serve.blobs import TIMEOUT, Blobs, Buffer, open_blobs
from kvcomp.spec import CodecSpec
from kvcomp.store import KVStore
from kvcomp.store.tensors import NAMES

if TYPE_CHECKING:
    from kvcomp.integrations.transformers import KVCompCache

OTHER_BOOKS = "another process has stored this beginning first: nothing is added to it"
BY_LENGTH = (
    "no prefix of so long a prompt is stored or loaded: the rotary frequencies (dynamic, longrope) depend on its length"
)

logger = logging.getLogger("kvcomp")


class PrefixStore:
    """Compressed caches of prompts in a folder or in Redis, chunk by chunk; shared beginnings are there once.

    Several processes may use one store at once.

    Parameters
    ----------
    url
        A folder's path or ``file://``, or ``redis://``, ``rediss://``, ``valkey://``, ``valkeys://``, ``unix://``,
        which need redis-py.
    limit
        Bytes that a folder may hold, None for no limit; the least recently used chunks go first. Redis has its own:
        maxmemory with allkeys-lru.
    timeout
        Seconds that any one call to Redis may take in all. A call moves some 16 MB, or one chunk if that is larger.

    Raises
    ------
    InvalidInput
        For a URL that is none. Whether a server is there shows at the first call.
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
        """Load the longest stored beginning of a prompt that leaves at least one token to compute.

        Parameters
        ----------
        ids
            (tokens,) or (1, tokens), of one prompt without padding.
        model
            A transformers model.
        spec, calibration, backend
            As KVCompCache takes them.
        model_id
            A name for the model's weights instead of their hash.

        Returns
        -------
        KVCompCache
            An empty one if nothing is stored.

        Raises
        ------
        StoreUnavailable
            If the store does not answer in time, or refuses.
        InvalidInput, UnsupportedModel
            If such a cache cannot be.
        BackendUnavailable
            If there is no such backend.
        CorruptData, UnsupportedVersion, LimitExceeded
            If the calibration's file is damaged, newer or too large, or the spec's is newer.
        """
        from kvcomp.integrations.transformers import KVCompCache
        from kvcomp.integrations.transformers.files import give
        from kvcomp.integrations.transformers.layers import keep_first_windows_raw
        from kvcomp.integrations.transformers.models import check_text_only

        check_text_only(model)

        def new() -> KVCompCache:
            cache = KVCompCache(model.config, spec, calibration=calibration, backend=backend)
            keep_first_windows_raw(cache.layers)
            return cache

        cache = new()
        _check_layers(cache)
        origin = _origin(cache, model, model.dtype, model_id)
        tokens = _tokens(ids)
        if cache.session.length_matters(len(tokens)):
            logger.warning(BY_LENGTH)
            return cache
        chain = Chain.find(self.blobs, origin, tokens, host_backend(backend))
        if chain is None:
            return cache
        if _has_states(cache):
            return _resumed(chain, tokens, new, model) or _empty(cache, chain)
        chunks = chain.read(chain.there)
        for index in origin.compressed:
            give(cache.layers, index, join_chunks([stores[index] for stores in chunks]))
        return cache

    def prefill(
        self, ids: Tensor | Sequence[int], cache: KVCompCache, model: Any, *, model_id: str | None = None
    ) -> None:
        """Compute the first part of a prompt, and store it where other prompts can go on.

        A model with sliding windows or linear attention goes on only from places where its state was stored. So the
        prompt is computed, and stored, up to two of them: where it leaves what the store has of other prompts, and its
        last whole chunk. A model of full attention alone goes on from any chunk: nothing is done.

        Parameters
        ----------
        ids
            The prompt, as in ``load``.
        cache
            What ``load`` gave for it.
        model, model_id
            As in ``load``; under the attention "kvcomp".

        Raises
        ------
        StoreUnavailable, LimitExceeded, InvalidInput, UnsupportedModel
            As ``save``; InvalidInput also for another attention.
        """
        from kvcomp.integrations.transformers.attention import NAME
        from kvcomp.integrations.transformers.recompute import forward

        tokens = _tokens(ids)
        _check(cache, model)
        if not _has_states(cache):
            return
        if model.config._attn_implementation != NAME:
            raise InvalidInput(f'call model.set_attn_implementation("{NAME}") first: no other can be stored')
        if cache.session.length_matters(len(tokens)):
            logger.warning(BY_LENGTH)
            return
        origin = _origin(cache, model, model.dtype, model_id)
        chain = Chain.find(self.blobs, origin, tokens, host_backend(cache.compressed_layers[0].backend))
        for chunks in sorted({chain.there if chain else 0, origin.chunks(len(tokens) - 1)}):
            held, end = cache.get_seq_length(), origin.end(chunks - 1)
            if chunks > 1 and held < end:  # with fewer, codebooks are not fixed yet
                forward(model, tokens[held:end], held, cache)
                self.save(tokens[:end], cache, model, model_id=model_id)

    def save(self, ids: Tensor | Sequence[int], cache: KVCompCache, model: Any, *, model_id: str | None = None) -> int:
        """Store what is compressed of a cache and not there yet.

        Of a model with sliding windows or linear attention also the state at the cache's end, from which it goes on.
        Nothing is stored of a cache whose codebooks are not fixed yet, or if another process has just stored the same
        beginning with codebooks of its own: whoever loads that goes on from there.

        Parameters
        ----------
        ids
            The tokens that the cache was filled with, of one prompt without padding; more may follow.
        cache
            Filled from these ids alone, under the attention "kvcomp".
        model, model_id
            As in ``load``: the model that filled the cache.

        Returns
        -------
        int
            From the end of how many first tokens ``load`` can go on now; 0 where a folder has no room for the state of
            a model that needs one.

        Raises
        ------
        StoreUnavailable
            If the store does not answer in time, or refuses.
        LimitExceeded
            If a folder's limit is less than the first chunk.
        InvalidInput, UnsupportedModel
            If K and V are not, or may not be, those of the ids under the model; nothing is stored then.
        """
        from kvcomp.integrations.transformers.files import linear_states, stores_of
        from kvcomp.integrations.transformers.recompute import check_recomputed

        tokens = _tokens(ids)
        _check(cache, model)
        every = stores_of(cache.layers, cache.spec)
        cache.session.check_from_ids()
        stores = {index: every[index] for index in _compressed(cache)}
        first = next(iter(stores.values()))
        if first.batch != 1 or first.starts[0] or first.tokens > len(tokens):
            raise InvalidInput(
                f"the cache holds {first.batch} rows of {first.tokens} tokens: give one row without padding, and "
                "the tokens it was filled with"
            )
        origin = _origin(cache, model, first.dtype, model_id)
        if cache.session.length_matters(cache.session.longest):
            logger.warning(BY_LENGTH)
            return 0
        count, with_state = storable(stores), _has_states(cache)
        if not count or (with_state and not all(whole_pages(store).all() for store in stores.values())):
            return 0
        hashes = origin.hashes(tokens, origin.chunks(first.tokens))
        first_key = key_of(hashes[0])
        value = pack(origin, stores, 0, first_key)
        books = books_of(header_of(value))
        host = host_backend(cache.compressed_layers[0].backend)

        def books_there() -> bytes | None:
            there = open_chunk(self.blobs, origin, first_key, self.blobs.get([first_key])[0], 0, host)
            return None if there is None else books_of(there[0])

        there = books_there()
        if there not in (None, books):
            logger.info(OTHER_BOOKS)
            return 0
        keys = [key_of(x, books) for x in hashes[1:count]]
        missing = [chunk for chunk, size in enumerate(self.blobs.sizes(keys), 1) if size is None]
        state_key = key_of(next(origin.state_hashes(tokens, [first.tokens], hashes)), books)
        state = with_state and self.blobs.sizes([state_key]) == [None]
        if there is None or missing or state:
            check_recomputed(stores, model, tokens, None if state else count * CHUNK_PAGES)
        if there is None and not self.blobs.put_new(first_key, value):
            there = books_there()
            if there is None:  # what is there is of no use
                self.blobs.put([(first_key, value)])
            elif there != books:
                logger.info(OTHER_BOOKS)
                return 0
        step, kept = max(1, CALL_BYTES // sum(len(piece) for piece in value)), [first_key, *keys]
        try:
            for begin in range(0, len(missing), step):
                some = missing[begin : begin + step]
                packed = [(keys[chunk - 1], pack(origin, stores, chunk, keys[chunk - 1])) for chunk in some]
                _put(self.blobs, packed, kept)
            if state:
                found = state_of(origin, every, linear_states(cache.layers), count)
                self.blobs.put([(state_key, pack_state(origin, found, state_key, first.tokens))], kept)
        except LimitExceeded as error:
            logger.warning("the end of a prompt is not stored: %s", error)
            sizes = [*self.blobs.sizes(keys), None]
            return 0 if with_state else origin.end(sizes.index(None))
        return first.tokens if with_state else origin.end(count - 1)

    def close(self) -> None:
        """Give back connections; the store connects again if it is used again."""
        self.blobs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _put(blobs: Blobs, items: Sequence[tuple[str, Sequence[Buffer]]], kept: Sequence[str]) -> None:
    """Store the first values that there is room for. Raises LimitExceeded if that is not all."""
    try:
        blobs.put(items, kept)
    except LimitExceeded:
        if len(items) == 1:
            raise
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            _put(blobs, half, kept)


def _tokens(ids: Tensor | Sequence[int]) -> list[int]:
    try:
        x = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"ids must be the token ids of one prompt, a tensor or a list of numbers: {error}") from None
    if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != 1):
        raise InvalidInput(f"ids must be the token ids of one prompt, (tokens,) or (1, tokens), not {tuple(x.shape)}")
    if x.numel() and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise InvalidInput(f"ids must be whole numbers, not {x.dtype}")
    found: list[int] = x.reshape(-1).tolist()
    if min(found, default=0) < 0:
        raise InvalidInput(f"ids must be token ids from 0, and there is {min(found)}: give them without padding")
    return found


def _check(cache: KVCompCache, model: Any) -> None:
    """Raise UnsupportedModel or InvalidInput unless a cache may be stored under token ids."""
    from kvcomp.integrations.transformers import KVCompCache
    from kvcomp.integrations.transformers.models import check_text_only

    check_text_only(model)
    if not isinstance(cache, KVCompCache):
        raise InvalidInput(f"only a KVCompCache can be stored, not a {type(cache).__name__}")
    cache.session.check_ended()
    _check_layers(cache)


def _check_layers(cache: KVCompCache) -> None:
    from kvcomp.integrations.transformers.files import check_layers

    check_layers(cache.layers)
    if not _compressed(cache):
        raise UnsupportedModel(
            "a prefix is stored as compressed pages, and every layer of this model has a sliding window: save whole "
            "caches with KVCompCache.save"
        )


def _compressed(cache: KVCompCache) -> list[int]:
    """The layers that chunks hold: those that keep all tokens."""
    of_all = [layer for layer in cache.compressed_layers if not layer.is_sliding]
    return [index for index, layer in enumerate(cache.layers) if layer in of_all]


def _has_states(cache: KVCompCache) -> bool:
    """Whether some layer goes on only from where it stands."""
    from kvcomp.integrations.transformers.files import needed_layers

    with_kv, linear = needed_layers(cache.layers)
    return bool(linear) or with_kv != _compressed(cache)


def _resumed(chain: Chain, tokens: list[int], new: Callable[[], KVCompCache], model: Any) -> KVCompCache | None:
    """A new cache that stands at the longest state that there is; None if there is none."""
    from kvcomp.integrations.transformers.files import give, shapes_of
    from kvcomp.integrations.transformers.recompute import one_token
    from kvcomp.integrations.transformers.stock import give_states

    filled = one_token(model, tokens[0])

    def fill(state: State, chunks: list[dict[int, KVStore]]) -> KVCompCache:
        cache = new()
        for index, store in state.stores.items():
            whole = join_chunks([*(x[index] for x in chunks), store]) if index in chain.origin.compressed else store
            give(cache.layers, index, whole, filled[index])
        for index, states in state.linear.items():
            give_states(cache.layers[index], states, filled[index])
        return cache

    return chain.resume(tokens, shapes_of(filled), fill)


def _empty(cache: KVCompCache, chain: Chain) -> KVCompCache:
    """A cache of no tokens with a chain's codebooks, so that what it will hold can be added to that chain."""
    from kvcomp.integrations.transformers.files import give

    for index, store in chain.first.items():
        store.crop(0)
        give(cache.layers, index, store)
    return cache


def _origin(cache: KVCompCache, model: Any, dtype: torch.dtype, model_id: str | None) -> Origin:
    from kvcomp.integrations.transformers.identity import configuration_of, weights_id
    from kvcomp.integrations.transformers.models import text_config

    if dtype not in NAMES:
        raise InvalidInput(f"the model has {dtype}: float32, float16 or bfloat16 are possible")
    configuration = configuration_of(text_config(model.config))
    cache.session.check_configuration(configuration)
    about = {"id": weights_id(model if model_id is None else model_id), "configuration": configuration}
    return Origin(about, len(cache.layers), _compressed(cache), NAMES[dtype], cache.spec, cache.calibration)
