"""Files: the old one or the new one, never a part; and what is read is what was written."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvcomp
from kvcomp import files
from kvcomp.errors import CorruptData, InvalidInput, UnsupportedVersion
from kvcomp.spec import PRESETS, CodecSpec
from kvcomp.store import KVStore
from kvcomp.store import join as joining
from sealing import seal, unseal

LOSSY = replace(PRESETS["kvcomp"], window=16)


# Tensors without a model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_tensors_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    packed = kvcomp.compress(*torch.randn(2, 2, 3, 200, 64).to(dtype))
    packed.save(tmp_path / "a.kvc")
    again = kvcomp.load(tmp_path / "a.kvc")
    assert all(torch.equal(x, y) for x, y in zip(packed.decompress(), again.decompress(), strict=True))
    q = torch.randn(2, 6, 1, 64).to(dtype)
    assert torch.equal(packed.attend(q), again.attend(q))
    first = kvcomp.load(tmp_path / "a.kvc", rows=[1], tokens=100)
    assert all(torch.equal(x[1:, :, :100], y) for x, y in zip(packed.decompress(), first.decompress(), strict=True))


def test_stores_that_do_not_belong_together_are_not_joined() -> None:
    def store(channels: int = 16, dtype: torch.dtype = torch.float32, spec: CodecSpec = LOSSY) -> KVStore:
        made = KVStore(spec)
        made.append(*torch.randn(2, 1, 2, 20, channels).to(dtype))
        return made

    for other in (store(32), store(dtype=torch.float16), store(spec=PRESETS["kvcomp"])):
        with pytest.raises(InvalidInput, match="of one spec, shape, dtype and device"):
            joining.join([store(), other])
    for none in ([], [KVStore(LOSSY)]):
        with pytest.raises(InvalidInput, match="that hold tokens"):
            joining.join(none)


def test_layers_that_differ_are_not_saved(tmp_path: Path) -> None:
    stores = {}
    for layer in (0, 1):
        stores[layer] = KVStore(LOSSY)
        stores[layer].append(*torch.randn(2, 1, 2, 20 + layer, 16))
    with pytest.raises(InvalidInput, match="the same rows and tokens"):
        files.save(tmp_path / "a.kvc", stores, LOSSY, 2)
    assert not list(tmp_path.iterdir())


# Writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_and_readers_never_see_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a.kvc"
    packs = [kvcomp.compress(*torch.full((2, 1, 2, 100, 16), float(number))) for number in (1, 2)]
    expected = [packed.decompress()[0] for packed in packs]
    packs[0].save(path)
    done, seen = threading.Event(), set()

    def write(number: int) -> None:
        for _ in range(60):
            packs[number].save(path)

    def look() -> None:
        while not done.is_set():
            k, _ = kvcomp.load(path).decompress()
            seen.add(next(number for number, x in enumerate(expected) if torch.equal(x, k)))
            assert [name for name in names(tmp_path) if not name.startswith(".")] == ["a.kvc"]

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(look) for _ in range(2)]
        writers = [pool.submit(write, number) for number in (0, 1)]
        wait(writers)
        done.set()
        for future in writers + readers:
            future.result()
    assert seen <= {0, 1}
    assert seen
    assert names(tmp_path) == ["a.kvc"]


def test_a_loaded_cache_outlives_its_file(tmp_path: Path) -> None:
    packed = kvcomp.compress(*torch.randn(2, 1, 2, 200, 16))
    packed.save(tmp_path / "a.kvc")
    again = kvcomp.load(tmp_path / "a.kvc")
    kvcomp.compress(*torch.zeros(2, 1, 2, 100, 16)).save(tmp_path / "a.kvc")
    (tmp_path / "a.kvc").unlink()
    assert torch.equal(again.decompress()[0], packed.decompress()[0])


# Reading


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kvcomp.load(tmp_path / "none.kvc")
    with pytest.raises(InvalidInput, match="only a file can be mapped"):
        kvcomp.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="only a file can be mapped"):
        kvcomp.load(tmp_path / "pipe")
    (tmp_path / "empty.kvc").write_bytes(b"")
    with pytest.raises(CorruptData, match="is empty"):
        kvcomp.load(tmp_path / "empty.kvc")
    (tmp_path / "text.kvc").write_bytes(b"hello, this is no kvc file at all")
    with pytest.raises(CorruptData, match=r"this is no \.kvc file"):
        kvcomp.load(tmp_path / "text.kvc")
    kvcomp.compress(*torch.randn(2, 1, 1, 70, 16)).save(tmp_path / "a.kvc")
    (tmp_path / "new.kvc").write_bytes(seal(*unseal((tmp_path / "a.kvc").read_bytes()), version=9))
    with pytest.raises(UnsupportedVersion):
        kvcomp.load(tmp_path / "new.kvc")
    for rows in ([2], [-2]):
        with pytest.raises(InvalidInput, match="rows must be"):
            kvcomp.load(tmp_path / "a.kvc", rows=rows)
