"""What the layers of one cache share: the model it belongs to, and the forward pass that is under way."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvcomp.errors import InvalidInput, LimitExceeded, UnsupportedModel
from kvcomp.integrations.transformers.identity import configuration_of, difference, rope_switch
from kvcomp.integrations.transformers.masks import MaskPlan, read_mask
from kvcomp.integrations.transformers.models import identity_of, position_limit
from kvcomp.store import Store

if TYPE_CHECKING:
    from kvcomp.integrations.transformers.cache import KVCompCache

logger = logging.getLogger("kvcomp")


class ForwardPass:
    """One forward pass over a cache, which counts in every layer or in none.

    It begins with the update of the first layer. Each update, and each attention of "kvcomp", runs inside ``with``. If
    one fails before all layers have the new tokens and have compressed what they must, all go back to where they were.
    A failure between two layers shows when the cache is used next: that use is refused. Sliding windows and linear
    attention cannot go back: the cache then refuses everything until it is reset.
    """

    def __init__(self, cache: KVCompCache) -> None:
        self._cache = ref(cache)
        self._before = cache.get_seq_length(cache.first)
        self._not_from_ids = cache.session.not_from_ids
        self._thread = get_ident()

    def __enter__(self) -> None:
        if self._thread != get_ident():
            raise InvalidInput(
                "another thread is in the middle of a forward pass: use a cache for each generation, or reset this one"
            )

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        cache = self._cache()
        if kind is not None and cache is not None:
            layers = cache.compressed_layers
            if not self.ended or any(layer.unsealed for layer in layers):
                self.roll_back()

    @property
    def ended(self) -> bool:
        """Whether all layers have the same tokens."""
        cache = self._cache()
        layers = [] if cache is None else [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
        return len({layer.get_seq_length() for layer in layers}) <= 1

    def roll_back(self) -> None:
        """Take the tokens of this pass from the layers that have them."""
        cache = self._cache()
        assert cache is not None
        session = cache.session
        session.plans.clear()
        session.positions = session.sealing = None
        session.not_from_ids = self._not_from_ids
        for layer in cache.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                session.lost = True
            elif isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > self._before:
                session.lost |= layer not in cache.compressed_layers
        for compressed in cache.compressed_layers:
            if compressed.store.tokens > self._before:
                compressed.roll_back(self._before)


class Session:
    """The model a cache belongs to, the forward pass under way with its mask, and the layer that a GPU compresses
    meanwhile.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = ref(config)
        self.identity = identity_of(config)
        self.configuration = configuration_of(config)
        self.rope_switch = rope_switch(config)
        self.limit = position_limit(config)
        self.calibrated_tokens: int | None = None
        """Of the windows that a calibration was measured on."""
        self.linear: frozenset[int] = frozenset()
        """Numbers of the layers of linear attention."""
        self.reset()

    def reset(self) -> None:
        """Forget all but the model."""
        self.forward: ForwardPass | None = None
        self.plans: dict[int | None, MaskPlan] = {}
        """Those of the present pass by sliding window."""
        self.positions: Tensor | None = None
        """Those of the new tokens, once they have been checked."""
        self.sealing: Store | None = None
        self.recording = False
        """A CUDA graph is recorded: what depends on the number of the step is done outside it."""
        self.announced: set[int] = set()
        """Layers that the present pass made a mask for, until the first one with K and V has the new tokens."""
        self.moved: set[int] = set()
        """Layers of linear attention that gave the new tokens of the present pass to their states."""
        self.longest = 0
        """Tokens at the end of the longest forward pass."""
        self.lost = False
        """A forward pass failed and could not be taken back."""
        self.not_from_ids: str | None = None
        """Why K and V may be others than a causal pass over the token ids gives; None if nothing says so."""

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise InvalidInput if this is the configuration of another model."""
        other = identity_of(config)
        for name, mine in self.identity.items():
            if other[name] != mine:
                raise InvalidInput(
                    f"this cache was made for a model with {name} {mine!r}, not {other[name]!r}: "
                    "make a KVCompCache for each model"
                )
        self.config = ref(config)

    def begin(self, forward: ForwardPass, before: int, new: int) -> None:
        """A forward pass over so many new tokens begins, after those before."""
        self.forward = forward
        self.announced.clear()
        self.plans.clear()
        self.positions = None
        self.longest = max(self.longest if before else 0, before + new)
        if self.calibrated_tokens is not None and before <= self.calibrated_tokens < before + new:
            logger.warning(
                "the calibration was measured on %d tokens, and what comes after them is coded much less well: "
                "calibrate with a larger --context, or use the preset kvcomp",
                self.calibrated_tokens,
            )

    def length_matters(self, tokens: int) -> bool:
        """Whether the rotary frequencies of a forward pass that ends at so many tokens are others than those of a short
        one.
        """
        return self.rope_switch is not None and tokens >= self.rope_switch

    def check_limit(self, new: int, seen: int) -> None:
        """Raise InvalidInput for no new tokens, LimitExceeded for more than the model's positions allow."""
        if new < 1:
            raise InvalidInput("there are no new tokens: give at least one")
        if self.limit is not None and seen + new > self.limit:
            raise LimitExceeded(
                f"the model's positions end at {self.limit} tokens: the cache holds {seen}, so {new} more do not fit"
            )

    def check_lengths(self, *lengths: int) -> None:
        """Raise InvalidInput if the K of sequences of different lengths would come together, and depend on
        the length.
        """
        if len(set(lengths)) > 1 and self.length_matters(max(lengths)):
            raise InvalidInput(
                f"the model's rotary frequencies depend on the length from {self.rope_switch} tokens on, "
                f"so K of {max(lengths)} tokens is not that of {min(lengths)}: compute it anew"
            )

    def check_configuration(self, configuration: Mapping[str, Any]) -> None:
        """Raise InvalidInput if this is the configuration of a model whose K and V are others."""
        other = difference(self.configuration, configuration)
        if other:
            raise InvalidInput(f"this cache is of {other}: make a KVCompCache for each model")

    def announce(self, layer: int) -> None:
        """A forward pass makes its mask for a layer, before any layer has the new tokens.

        Raises InvalidInput if the states of linear attention are not all where the K and V are, UnsupportedModel for an
        attention that fails on a compressed cache.
        """
        if getattr(self.config(), "_attn_implementation", None) == "flex_attention":
            raise UnsupportedModel(
                "flex_attention compiles its own reading of K and V, which no compressed cache can be part of: "
                'call model.set_attn_implementation("kvcomp")'
            )
        if self.linear:
            self.lost |= layer in self.announced or not self._states_agree
            self.check_whole()
            if not self.announced:
                self.moved.clear()
            self.announced.add(layer)

    @property
    def _states_agree(self) -> bool:
        """Some models change states in place without a word, at single tokens: then nothing has moved."""
        return not self.moved or self.linear <= self.moved

    def check_ended(self) -> None:
        """Raise InvalidInput if the last forward pass did not come to its end; its tokens are taken back."""
        self.lost |= bool(self.announced) or not self._states_agree
        self.check_lengths_agree()

    def check_lengths_agree(self) -> None:
        """The same, by the tokens of the layers with K and V alone."""
        before = self.forward
        if before is not None and not before.ended:
            with before:
                before.roll_back()
            self.check_whole()
            raise InvalidInput("the last forward pass did not end; its tokens are taken back: run this one again")
        self.check_whole()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise InvalidInput as ``check_ended`` if a crop counts from the end, which layers then have elsewhere."""
        if tokens_to_remove < 0:
            self.check_ended()

    def check_whole(self) -> None:
        """Raise InvalidInput if a forward pass failed and could not be taken back."""
        if self.lost:
            raise InvalidInput(
                "the last forward pass failed in its middle, and sliding windows and linear attention cannot go back: "
                "reset the cache or make a new one"
            )

    def check_from_ids(self) -> None:
        """Raise InvalidInput if K and V may be others than a causal pass over the token ids gives."""
        if self.not_from_ids is not None:
            raise InvalidInput(
                f"this cache cannot be stored under its token ids: {self.not_from_ids}. Fill one from the ids alone, "
                'with attn_implementation="kvcomp"; KVCompCache.save keeps any cache'
            )

    def another_attention(self) -> None:
        """Note that the cache was read by another attention than "kvcomp", which tells it no mask."""
        if self.not_from_ids is None:
            self.not_from_ids = 'another attention than "kvcomp" read the cache, so its mask is not known'
            logger.info("%s: call model.set_attn_implementation('kvcomp')", self.not_from_ids)

    def plan_for(self, mask: Tensor, queries: int, store: Store, seen: int) -> MaskPlan:
        """What the mask of a layer means, which is of so many of its last tokens."""
        window = store.sliding_window
        if window not in self.plans or self.plans[window].mask() is not mask:
            self.plans[window] = read_mask(mask, store.batch, queries, store.tokens, seen, window)
        return self.plans[window]

    def check_positions(self, positions: Tensor, expected: npt.NDArray[np.int64]) -> None:
        """Raise InvalidInput if the last new token comes before its place in a row. positions: (batch or 1, new
        tokens).
        """
        if positions is self.positions:
            return
        last = positions[:, -1].cpu().numpy()
        if (last < expected).any():
            raise InvalidInput(
                f"the new tokens end at the positions {last.tolist()}, in the cache they end at {expected.tolist()}: "
                "give generate ids that go beyond those in the cache (crop takes the last ones out), their whole "
                "attention mask, and no use_cache=False"
            )
        self.positions = positions

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        self.check_ended()
        twin = Session.__new__(Session)
        vars(twin).update(vars(self), forward=None, plans={}, positions=None, sealing=None)
        twin.announced, twin.moved = set(), set(self.moved)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidInput("a KVCompCache cannot be pickled, as pages are known by their addresses: save it in a file")
