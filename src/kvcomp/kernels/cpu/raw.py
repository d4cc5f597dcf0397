# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs, disable-error-code=attr-defined
"""Values -> pages all of whose blocks are raw, token by token."""

from __future__ import annotations

from kvcomp.kernels.cpu.bits import compiled, copy_bytes
from kvcomp.kernels.cpu.page import TOKENS


@compiled(entry=True)
def write_rows(pages, offsets, source, strides, first_block, heads, row_bytes):
    """Copy K and V of each token, at the two addresses ``source``, to its place in its page.

    pages, offsets: int64 (tokens,). strides: int64 (2, 3), those of K and V, (tokens, heads, channels), in bytes.
    first_block: offset of the first block in a page. row_bytes: of a token of a head.
    """
    for token in range(pages.size):
        to = pages[token] + first_block + offsets[token] * row_bytes
        for kind in range(2):
            values = source[kind] + token * strides[kind, 0]
            for head in range(heads):
                copy_bytes(values + head * strides[kind, 1], to, row_bytes)
                to += TOKENS * row_bytes
