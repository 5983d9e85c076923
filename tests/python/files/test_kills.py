"""A kill at any system call of a save loses nothing: the old folder is there, or the new one."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import save
from gptc.files import whole
from gptc.files.whole import (
    clean_up,
    discard,
    restore,
    scratch_folder,
    whole_folder,
    write_file,
)
from small_models import make_checkpoint, make_config

CALLS = [
    "mkdir",
    "open",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "fsync",
]  # between others nothing changes
KILLED = 9

Check = Callable[[Path, bool], None]  # of a folder, whose filesystem may exchange two names


def killed_at(nth: int, after: bool, action: Callable[[], object]) -> bool:
    """Runs an action in a child that ends before or after its n-th call; False: it had fewer."""
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == nth and not after:
                        os._exit(KILLED)
                    own = count
                    try:
                        return real(*args, **options)
                    finally:
                        if own == nth and after:
                            os._exit(KILLED)

                return call

            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            fcntl.flock = counted(fcntl.flock)
            whole._exchange = counted(whole._exchange)  # type: ignore[assignment]
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Lets hundreds of kills take a moment.

    A kill leaves the kernel's memory as it is, so nothing needs to reach the disk. Folders that a
    kill left without a mark are removed by the next visit.
    """
    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setattr(whole, "_MARKED_S", -1.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


@pytest.fixture(scope="module")
def small() -> Iterator[ProcessPoolExecutor]:
    """A process in which few modules are loaded: a fork of one that tests have filled is slow."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def in_small(check: Check, folder: Path, exchange: bool) -> None:
    """Runs a check on a filesystem that can exchange two names, or on one that cannot."""
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        if not exchange:
            patch.setattr(whole, "_exchange", lambda one, other: False)
        check(folder, exchange)


def kills() -> Iterator[tuple[int, bool]]:
    """Before and after each call; the loop's body ends it when there are no more."""
    for nth in range(1, 2000):
        yield nth, False
        yield nth, True
    raise AssertionError("it does not end")


def leftovers(folder: Path) -> list[str]:
    """Names other than the model's."""
    return [path.name for path in folder.iterdir() if path.name not in ("model", "sources")]


def replacement(folder: Path, exchange: bool) -> None:
    path, seen = folder / "model", set()

    def put(content: str) -> None:
        with whole_folder(path) as made:
            (made / "a").write_text(content)
            (made / "b").write_text(content)

    for nth, after in kills():
        put("old")
        killed = killed_at(nth, after, lambda: put("new"))
        if exchange:
            assert path.is_dir(), nth
        restore(path)
        found = [(path / name).read_text() for name in "ab"]
        assert found in (["old", "old"], ["new", "new"]), nth
        seen.add(found[0])
        clean_up(folder)
        assert [(path / name).read_text() for name in "ab"] == found
        assert leftovers(folder) == []
        if not killed:
            break
    assert seen == {"old", "new"}
    assert nth > 10


def write(folder: Path, exchange: bool) -> None:
    """And the next write removes what the killed one left."""
    path, seen = folder / "config", set()
    others = [folder / ".config.0011aabb.partial.txt", folder / ".other.0011aabb.partial"]
    for other in others:
        other.write_text("theirs")
    for nth, after in kills():
        write_file(path, b"old")
        killed = killed_at(nth, after, lambda: write_file(path, b"new"))
        seen.add(path.read_bytes())
        write_file(path, b"old")
        assert sorted(folder.iterdir()) == sorted([path, *others])
        if not killed:
            break
    assert seen == {b"old", b"new"}
    assert nth > 2


def save_of_a_model(folder: Path, exchange: bool) -> None:
    old = make_checkpoint(make_config("gpt2"), folder=folder / "sources" / "old")
    new = make_checkpoint(make_config("llama"), folder=folder / "sources" / "new")
    path = folder / "saved" / "model"
    for nth, _ in kills():
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(old.path, path)
        killed = killed_at(nth, False, lambda: save(path, new, replace=True))
        found = Checkpoint(find_checkpoint(path))
        found.verify()
        assert found.config in (old.config, new.config)
        clean_up(path.parent)
        assert leftovers(path.parent) == []
        if not killed:
            break
    assert nth > 20


def removal(folder: Path, exchange: bool) -> None:
    path = folder / "model"
    for nth, after in kills():
        path.mkdir(exist_ok=True)
        (path / "a").write_text("old")
        killed = killed_at(nth, after, lambda: discard(path))
        clean_up(folder)
        assert not path.exists() or (path / "a").read_text() == "old"
        assert leftovers(folder) == []
        if not killed:
            break


@pytest.mark.parametrize(
    ("check", "exchange"),
    [
        *product((replacement, save_of_a_model), (True, False)),
        (write, True),
        (removal, True),
    ],
)
def test_a_kill_leaves_the_old_content_or_the_new(
    small: ProcessPoolExecutor, tmp_path: Path, check: Check, exchange: bool
) -> None:
    small.submit(in_small, check, tmp_path, exchange).result()


def test_a_file_that_another_process_writes_is_kept(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        write_file(tmp_path / "config", b"in between")
        yield b"at last"

    write_file(tmp_path / "config", chunks())
    assert (tmp_path / "config").read_bytes() == b"at last"
    assert len([*tmp_path.iterdir()]) == 1


REPLACE = """
import sys
from pathlib import Path
from gptc.files.whole import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("new")
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
def test_a_kill_by_the_kernel_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """strace kills the process at each call that changes a name."""
    path, seen = tmp_path / "model", set()
    for call in ["mkdir", "rename", "renameat2", "unlink", "unlinkat", "rmdir", "fsync", "flock"]:
        for nth in range(1, 30):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            (path / "a").write_text("old")
            command = [sys.executable, "-B", "-c", REPLACE, str(path)]
            inject = ["strace", "-f", "-e", f"inject={call}:signal=SIGKILL:when={nth}"]
            ran = subprocess.run([*inject, *command], capture_output=True, text=True, check=False)
            if "ptrace" in ran.stderr.lower() and "not permitted" in ran.stderr:
                pytest.skip("strace may not trace here")
            text = (path / "a").read_text()
            assert text in ("old", "new"), (call, nth)
            clean_up(tmp_path)
            assert leftovers(tmp_path) == [], (call, nth)
            if ran.returncode == 0:
                break
            seen.add(call)
        assert text == "new"
    assert {"mkdir", "fsync", "flock", "rmdir"} < seen
    assert "renameat2" in seen or not hasattr(ctypes.CDLL(None), "renameat2")


# ---- folders that are not ours ----


@pytest.mark.parametrize(
    "name",
    [
        ".notes.tmp-2024",
        ".my.tmp-files",
        ".a.tmp-12-0011aabb",
        ".model.tmp-old-12",
        ".model.tmp-12",
        "model.tmp-12-0011aabb",
    ],
)
def test_folders_of_others_are_kept(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    (tmp_path / "empty.tmp-1").mkdir()
    with whole_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
    clean_up(tmp_path)
    discard(tmp_path / "model")
    assert (theirs / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "empty.tmp-1").is_dir()


def test_a_folder_without_a_mark_is_kept_while_its_writer_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    begun = tmp_path / f".model.tmp-{os.getpid()}-0011aabb"
    left = tmp_path / f".model.tmp-{ended.pid}-0011aabb"
    begun.mkdir()
    left.mkdir()
    monkeypatch.setattr(whole, "_MARKED_S", 60.0)  # the writer may be on another machine
    clean_up(tmp_path)
    assert begun.is_dir()
    assert left.is_dir()
    os.utime(begun, (1, 1))
    os.utime(left, (1, 1))
    clean_up(tmp_path)
    assert begun.is_dir()
    assert not left.exists()


def test_a_link_with_our_name_is_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / whole._MARK).touch()
    (theirs / "thesis.tex").write_text("years of work")
    (tmp_path / ".a.tmp-12-0011aabb").symlink_to(theirs)
    clean_up(tmp_path)
    assert (theirs / "thesis.tex").exists()


def test_the_scratch_folder_of_a_live_process_is_kept(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "model") as work:
        (work / "half").touch()
        clean_up(tmp_path)
        restore(tmp_path / "model")
        assert (work / "half").exists()
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_restored_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "a").write_text("old")
    monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    real, broken = Path.rename, False

    def rename(self: Path, target: Path) -> Path:
        nonlocal broken
        if broken or (self.name == "model" and self.parent != tmp_path):
            broken = True
            raise OSError("the disk is gone")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"), whole_folder(path) as folder:
        (folder / "a").write_text("new")
    monkeypatch.setattr(Path, "rename", real)
    restore(path)
    assert (path / "a").read_text() == "old"
