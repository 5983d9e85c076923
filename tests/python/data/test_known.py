"""A name, a file or a folder given as --data becomes one prepared dataset.

The class: a cached result that is found again although something that made it has changed.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from corpus import fake_stories, text_of, write_source
from gptc.data.preparation import prepare, resolve_dataset
from gptc.errors import GptcError


def test_a_known_name_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    first = resolve_dataset("stories", stories_bytes=2000)
    assert first.folder.parent == tmp_path / "cache" / "datasets"
    assert first.folder.name.startswith("stories-bytes-")
    monkeypatch.setattr("gptc.data.stories.corpus", lambda *_: pytest.fail("prepared again"))
    assert resolve_dataset("stories", stories_bytes=2000).folder == first.folder
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    folders = {
        resolve_dataset("stories", "char", stories_bytes=2000).folder,
        resolve_dataset("stories", stories_bytes=3000).folder,
        resolve_dataset("stories", stories_bytes=2000, seed=1).folder,
        first.folder,
    }
    assert len(folders) == 4


def test_a_damaged_cache_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    first = resolve_dataset("stories", stories_bytes=2000)
    first.shards("val")[0].unlink()
    again = resolve_dataset("stories", stories_bytes=2000)
    assert again.folder == first.folder
    again.verify()


def test_a_text_file_is_prepared_by_content(tmp_path: Path) -> None:
    source = write_source(tmp_path, "abc" * 100, "my text.txt")
    first = resolve_dataset(source)
    assert first.folder.name.startswith("my_text-bytes-")
    assert resolve_dataset(source).folder == first.folder
    write_source(tmp_path, "abd" * 100, "my text.txt")
    second = resolve_dataset(source)
    assert second.folder != first.folder
    assert text_of(second, "train") == b"abd" * 90
    assert resolve_dataset(str(second.folder), "char").tokenizer.kind == "bytes"


def test_an_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(GptcError, match="stories, stories-wide, shakespeare"):
        resolve_dataset("novels")
    with pytest.raises(GptcError, match=r"holds no dataset\.json"):
        resolve_dataset(str(tmp_path))


def test_a_folder_named_like_a_known_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptc.data.stories.corpus", fake_stories)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").mkdir()
    assert resolve_dataset("stories", stories_bytes=2000).folder.parent.name == "datasets"
    prepare([write_source(tmp_path, "abc" * 100)], Path("stories"))
    assert resolve_dataset("stories").folder == Path("stories")


def test_a_rename_that_changes_the_reader_is_prepared_again(tmp_path: Path) -> None:
    """The class: a cache whose key leaves out how a file is read."""
    rows = "".join(f'{{"id": {i}, "text": "row number {i}"}}\n' for i in range(20))
    found = []
    for before, after in [("p.json", "p.jsonl"), ("t.txt", "t.csv"), ("b.bin", "b.gz")]:
        data = gzip.compress(rows.encode()) if before == "b.bin" else rows.encode()
        data = b"id,text\n1,one\n2,two\n" if before == "t.txt" else data
        old, new = tmp_path / before, tmp_path / after
        old.write_bytes(data)
        plain = resolve_dataset(str(old))
        assert sorted(text_of(plain)) == sorted(data)
        old.rename(new)
        found.append(text_of(resolve_dataset(str(new))))
        assert found[-1] != data
        moved = new.rename(tmp_path / f"moved-{after}")
        assert text_of(resolve_dataset(str(moved))) == found[-1]
    assert b"row number 3" in found[0]
    assert b'"id"' not in found[0]
    assert found[2] == rows.encode()


def test_another_version_of_the_reader_is_prepared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path, "words " * 50)
    first = resolve_dataset(source)
    assert resolve_dataset(source).folder == first.folder
    monkeypatch.setattr("gptc.data.preparation.READER_VERSION", 99)
    assert resolve_dataset(source).folder != first.folder
