"""Bytes in files: the old ones or the new ones, never a part."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcomp import disk
from kvcomp.errors import InvalidInput

OLD, NEW = b"old" * 1000, [b"new" * 100_000, b"", memoryview(b"!" * 100)]
WHOLE = b"".join(NEW)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "a.kvc"
    for _ in range(2):
        disk.write(path, NEW)
        assert path.read_bytes() == WHOLE
    assert names(tmp_path) == ["a.kvc"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    (tmp_path / "link.kvc").symlink_to(path)
    disk.write(tmp_path / "link.kvc", [OLD])
    assert path.read_bytes() == OLD
    assert (tmp_path / "link.kvc").is_symlink()
    disk.write(tmp_path / ("é" * 120 + ".kvc"), [OLD])


@pytest.mark.parametrize(
    ("call", "after"), [("write", 0), ("write", 1), ("write", 2), ("fsync", 0), ("fsync", 1), ("replace", 0)]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
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
    with pytest.raises(OSError, match=os.strerror(code)):
        disk.write(path, NEW)
    in_place = (call, after) == ("fsync", 1)  # which is that of the folder
    assert path.read_bytes() == (WHOLE if in_place else OLD)
    assert names(tmp_path) == ["a.kvc"]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, draw = os.write, random.Random(0)
    monkeypatch.setattr(os, "write", lambda descriptor, data: plain(descriptor, data[: draw.randint(1, 5000)]))
    disk.write(tmp_path / "a.kvc", NEW)
    assert (tmp_path / "a.kvc").read_bytes() == WHOLE


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.write(tmp_path / "a.kvc", pieces())
    assert names(tmp_path) == []


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        disk.write(tmp_path / "none" / "a.kvc", NEW)
    assert not names(tmp_path)


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, through: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    _, device = os.openpty()  # no device that anyone would miss
    for path in (tmp_path / "folder", tmp_path / "pipe", Path(os.ttyname(device))):
        before = path.lstat()
        if through == "a link":
            (tmp_path / f"to-{path.name}").symlink_to(path)
            path = tmp_path / f"to-{path.name}"
        for call in (lambda path=path: disk.write(path, NEW), lambda path=path: disk.read(path)):
            with pytest.raises(InvalidInput, match="a folder, a pipe or a device"):
                call()
        assert (path.stat().st_mode, path.stat().st_ino) == (before.st_mode, before.st_ino)
    assert {"folder", "pipe"} <= set(names(tmp_path))


PIPED = """
from kvcomp import disk
from kvcomp.errors import InvalidInput

try:
    disk.write("/dev/stdout", [b"refused"])
except InvalidInput as error:
    assert "a folder, a pipe or a device" in str(error)
    disk.put("/dev/stdout", b"figures")
"""


def test_a_pipe_behind_the_standard_output_is_no_file_and_takes_what_may_go_there() -> None:
    done = subprocess.run([sys.executable, "-c", PIPED], capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"figures"), done.stderr


def test_what_may_go_anywhere_replaces_a_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    disk.put(path, OLD)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        disk.put(path, WHOLE)
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["figures.json"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    disk.write("~/a.kvc", [OLD])
    assert bytes(disk.read("~/a.kvc")) == OLD == (tmp_path / "a.kvc").read_bytes()
    assert names(tmp_path) == ["a.kvc"]


@pytest.mark.parametrize("path", ["", "a\0b", b"a", None, 3, "~nobody-of-this-name/a"])
def test_what_names_no_file(path: Any) -> None:
    for call in (lambda: disk.read(path), lambda: disk.write(path, NEW)):
        with pytest.raises(InvalidInput, match=r"path|expanded"):
            call()


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
    disk.write(tmp_path / "a.kvc", [b"x"])
    assert order == ["write", "fsync", "replace", "fsyncfolder"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from kvcomp import disk

path, rounds = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(5)
kinds = [bytes([kind]) * 300_000 for kind in (1, 2)]
disk.write(path, [kinds[0]])
seen = set()
for _ in range(rounds):
    begun, writing = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            for kind in kinds:
                disk.write(path, [kind[:100_000], kind[100_000:]])
            os.write(writing, b"x")
    os.read(begun, 1)  # however busy the machine is
    time.sleep(draw.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(begun)
    os.close(writing)
    data = path.read_bytes()
    assert data in kinds, (len(data), set(data))
    seen.add(data[0])
    assert len([p for p in path.parent.iterdir() if p.suffix == ".kvc"]) == 1
    assert len(list(path.parent.iterdir())) <= 2, "what one killed process left, the next one removes"
disk.write(path, [kinds[0]])
print(sorted(p.name for p in path.parent.iterdir()), len(seen))
"""


@pytest.mark.parametrize("rounds", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_a_save(tmp_path: Path, rounds: int) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.kvc"), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["['a.kvc']", "2"]


def test_a_file_behind_the_standard_output_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"before ")
    code = "from kvcomp import disk; disk.put('/dev/stdout', b'figures'); print(' after')"
    with path.open("ab") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True, timeout=120)
    assert path.read_bytes() == b"before figures after\n"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120)
    assert piped.stdout == b"figures after\n"
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        with pytest.raises(InvalidInput, match="no file replaces"):
            disk.write(name, NEW)
