"""Bytes as a .kvc file: opened and decoded, or refused with a typed error. Nothing else, and nothing past their end."""

from __future__ import annotations

from pathlib import Path

from harness import instrumented

with instrumented("kvcomp.files.check", "kvcomp.files.container", "kvcomp.files.header"):
    import kvcomp.files.container

import torch

from harness import LARGEST, Guarded, fuzz, mend, mutate
from kvcomp import files
from kvcomp.errors import CorruptData, LimitExceeded, UnsupportedVersion
from kvcomp.store.attention import attend

guarded = Guarded()
torch.set_num_threads(1)


def target(data: bytes) -> None:
    data = mend(data[:LARGEST])
    try:
        container = kvcomp.files.container.Container(guarded.place(data))
        stores = files.load(container)
        files.load_states(container)
    except (CorruptData, LimitExceeded, UnsupportedVersion):
        return
    for store in stores.values():
        if store.tokens and store.batch * store.heads * store.tokens * store.channels < 1 << 18:
            store.dense()
            attend(store, torch.ones(store.batch, store.heads, 1, store.channels), 0.1)


if __name__ == "__main__":
    fuzz(target, mutate, Path(__file__).parent / "seeds" / "container")
