"""Files: the old one or the new one, never a part; and what is read is what was written."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sealing import seal, unseal

import kvcomp
from kvcomp import files
from kvcomp.errors import CorruptData, InvalidInput, UnsupportedVersion
from kvcomp.spec import PRESETS, CodecSpec
from kvcomp.store import KVStore

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
        with pytest.raises(InvalidInput, match="of one spec, shape and dtype"):
            files.join([store(), other])
    for none in ([], [KVStore(LOSSY)]):
        with pytest.raises(InvalidInput, match="that hold tokens"):
            files.join(none)


def test_layers_that_differ_are_not_saved(tmp_path: Path) -> None:
    stores = {}
    for layer in (0, 1):
        stores[layer] = KVStore(LOSSY)
        stores[layer].append(*torch.randn(2, 1, 2, 20 + layer, 16))
    with pytest.raises(InvalidInput, match="the same rows and tokens"):
        files.save(tmp_path / "a.kvc", stores, LOSSY, 2)
    assert not list(tmp_path.iterdir())


# Writing


OLD, NEW = b"old" * 1000, [b"new" * 100_000, b"", memoryview(b"!" * 100)]
WHOLE = b"".join(NEW)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "a.kvc"
    for _ in range(2):
        files.write(path, NEW)
        assert path.read_bytes() == WHOLE
    assert names(tmp_path) == ["a.kvc"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    (tmp_path / "link.kvc").symlink_to(path)
    files.write(tmp_path / "link.kvc", [OLD])
    assert path.read_bytes() == OLD
    assert (tmp_path / "link.kvc").is_symlink()
    files.write(tmp_path / ("é" * 120 + ".kvc"), [OLD])


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, after: int
) -> None:
    path = tmp_path / "a.kvc"
    path.write_bytes(OLD)
    plain, calls = getattr(os, call), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        if call == "write":
            return plain(args[0], args[1][:1000])
        return plain(*args)

    monkeypatch.setattr(os, call, failing)
    if call == "replace" and after:
        files.write(path, NEW)
    elif call == "fsync" and after:  # the second is that of the folder: the file is in place by then
        if after == 1:
            with pytest.raises(OSError, match=os.strerror(code)):
                files.write(path, NEW)
        else:
            files.write(path, NEW)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.write(path, NEW)
        assert path.read_bytes() == OLD
        assert names(tmp_path) == ["a.kvc"]
        return
    assert path.read_bytes() == WHOLE
    assert names(tmp_path) == ["a.kvc"]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, draw = os.write, random.Random(0)
    monkeypatch.setattr(os, "write", lambda descriptor, data: plain(descriptor, data[: draw.randint(1, 5000)]))
    files.write(tmp_path / "a.kvc", NEW)
    assert (tmp_path / "a.kvc").read_bytes() == WHOLE


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a.kvc", pieces())
    assert names(tmp_path) == []


def test_a_full_device_is_an_os_error_and_a_folder_too(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write(tmp_path / "folder", NEW)
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "none" / "a.kvc", NEW)
    assert names(tmp_path) == ["folder"]


def test_data_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def spy(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def spied(*args: Any) -> Any:
            kind = "folder" if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode) else ""
            order.append(name + kind)
            return plain(*args)

        return spied

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, spy(name, getattr(os, name)))
    files.write(tmp_path / "a.kvc", [b"x"])
    assert order == ["write", "fsync", "replace", "fsyncfolder"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from kvcomp import files

path, rounds = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(5)
kinds = [bytes([kind]) * 300_000 for kind in (1, 2)]
files.write(path, [kinds[0]])
seen = set()
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        while True:
            for kind in kinds:
                files.write(path, [kind[:100_000], kind[100_000:]])
    time.sleep(draw.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    data = path.read_bytes()
    assert data in kinds, (len(data), set(data))
    seen.add(data[0])
    assert len([p for p in path.parent.iterdir() if p.suffix == ".kvc"]) == 1
    assert len(list(path.parent.iterdir())) <= 2, "what one killed process left, the next one removes"
files.write(path, [kinds[0]])
print(sorted(p.name for p in path.parent.iterdir()), len(seen))
"""


@pytest.mark.parametrize("rounds", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_a_save(tmp_path: Path, rounds: int) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.kvc"), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["['a.kvc']", "2"]


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
    assert seen == {0, 1}
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
    with pytest.raises(InvalidInput, match="is no file"):
        kvcomp.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="is no file"):
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
