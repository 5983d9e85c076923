"""`gptc prepare` prepares datasets and says what to type next.

The class: text that is refused or left out without a word, and work that Ctrl-C does not end.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gptc.cli.info import info_command
from gptc.cli.prepare import prepare_command
from gptc.data.dataset import Dataset
from gptc.data.shards import ShardFile
from gptc.errors import GptcError, UsageError
from processes import spawn


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time.\n" * 100)


def run(*arguments: str, given: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(prepare_command, arguments, input=given)
    if isinstance(result.exception, Exception):
        raise result.exception  # `gptc` turns it into an exit code
    return result


def test_the_size_of_a_byte_pair_encoding() -> None:
    for size in ("100", "10M"):
        with pytest.raises(UsageError, match=r"^--tokenizer bpe:\w+: the vocabulary size must be"):
            run("text.txt", "--out", "data", "--tokenizer", f"bpe:{size}")
    assert run("text.txt", "--out", "small", "--tokenizer", "bpe:260").stderr == ""
    few = run("text.txt", "--out", "data", "--tokenizer", "bpe:70K")
    found = Dataset.open(Path("data")).vocab_size
    words = f"the text has pairs for no more than {found:,}"
    assert few.stderr == f"note: 70,000 tokens were asked for, and {words}\n"
    assert "bpe:SIZE" in run("--help").output


def test_an_interrupt_while_a_tokenizer_is_learned_ends_at_once(tmp_path: Path) -> None:
    """The class: work outside Python, during which a signal has no effect for minutes."""
    rng = random.Random(1)
    letters = "abcdefghijklmnop"
    words = ("".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(500_000))
    (tmp_path / "long.txt").write_text(" ".join(words))
    process = spawn(
        "prepare", "long.txt", "--tokenizer", "bpe:20000", "--out", "data", cwd=tmp_path
    )
    deadline = time.monotonic() + 60
    while not _learns(process.pid):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 5  # alone on a machine, half a second
    assert process.returncode == 130
    assert "interrupted while the tokenizer was learned: nothing is kept\n" in err
    assert not (tmp_path / "data").exists()


def _learns(pid: int) -> bool:
    """Whether a process has written the plan of its preparation, so that learning is next."""
    return bool(list(Path(f"/proc/{pid}/cwd").glob("data/.partial/plan.json")))


def test_the_summary_says_what_to_type_next() -> None:
    result = run("text.txt", "--out", "my data")
    assert result.output.splitlines() == [
        "read   text.txt: 1,800 bytes",
        "tokens bytes, a vocabulary of 256",
        "train  1,620 tokens, 1.00 bytes per token, 1 shard",
        "val      180 tokens, 1.00 bytes per token, 1 shard",
        "The dataset is written: my data",
        "Next: gptc train --data 'my data'",
    ]
    assert "The dataset is already there: my data" in run("text.txt", "--out", "my data").output


def test_summary_and_info_count_files_and_documents() -> None:
    for i in range(20):
        Path("in").mkdir(exist_ok=True)
        Path("in", f"{i}.txt").write_text(f"file {i:02}\n" * 5)
    Path("rows.csv").write_text("id,text\n1,one\n2,\n")
    result = run("in", "rows.csv", "--out", "data")
    assert result.output.splitlines()[:3] == [
        "note: rows.csv: 1 row without text left out",
        "read   in: 800 bytes, 20 files, 20 documents",
        "read   rows.csv: 18 bytes, 1 file, 1 document, 1 row without text left out",
    ]
    assert "2 documents drawn at random" in result.output
    table = CliRunner().invoke(info_command, ["data"]).output
    assert "in, 20 files, 20 documents; rows.csv, 1 file" in table
    assert "2 documents drawn at random" in table


def test_an_empty_file_in_a_list_is_passed_over() -> None:
    for name in ("empty.txt", "none.jsonl"):
        Path(name).write_text("")
    result = run("empty.txt", "text.txt", "none.jsonl", "--out", "data")
    assert "note: the source empty.txt is empty\nnote: the source none.jsonl" in result.output
    assert [s["bytes"] for s in Dataset.open("data").meta["sources"]] == [0, 1800, 0]
    assert "already there" in run("empty.txt", "text.txt", "none.jsonl", "--out", "data").output
    with pytest.raises(GptcError, match=r"source empty\.txt is empty"):
        run("empty.txt", "none.jsonl", "--out", "other")
    assert not Path("other").exists()


def test_json_is_the_content_of_the_file() -> None:
    result = run("text.txt", "--out", "data", "--json")
    assert json.loads(result.output) == json.loads(Path("data/dataset.json").read_text())


def test_options_reach_the_dataset() -> None:
    run("text.txt", "--out", "data", "--tokenizer", "char", "--shard-tokens", "1K")
    dataset = Dataset.open("data")
    assert dataset.tokenizer.kind == "char"
    assert [len(dataset.shard("train", i)) for i in range(2)] == [1000, 620]
    run("text.txt", "--out", "data", "--val-tokens", "0.3K", "--jobs", "2", "--force")
    assert Dataset.open("data").n_tokens("val") == 300
    run("text.txt", "--out", "data", "--val-fraction", "0", "--force")
    assert "val" not in run("text.txt", "--out", "data", "--val-fraction", "0").output


def test_standard_input_is_a_source() -> None:
    result = run("-", "--out", "data", given=b"\xff" * 50)
    assert "read   standard input: 50 bytes" in result.output
    assert Dataset.open("data").n_tokens("train") == 45


def test_stories_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def corpus(n_bytes: int, seed: int = 0, *, wide: bool) -> list[bytes]:
        given.append((n_bytes, seed))
        return [b"story\n<|endoftext|>\n"] * 10

    monkeypatch.setattr("gptc.data.stories.corpus", corpus)
    assert "read   stories: 200 bytes" in run("--out", "a").output
    run("--out", "b", "--stories-bytes", "2M", "--seed", "3")
    assert given == [(5_000_000, 0), (2_000_000, 3)]


def test_mistakes_are_told() -> None:
    assert run("text.txt").exit_code == 2  # no --out
    assert run("text.txt", "--out", "x", "--val-tokens", "many").exit_code == 2
    with pytest.raises(UsageError, match="exclude"):
        run("text.txt", "--out", "x", "--val-tokens", "3", "--val-fraction", "0.1")
    with pytest.raises(UsageError, match="bytes, char, gpt2"):
        run("text.txt", "--out", "x", "--tokenizer", "words")
    with pytest.raises(GptcError, match=r"none\.txt"):
        run("none.txt", "--out", "x")
    assert not Path("x").exists()


def test_an_interruption_says_whether_anything_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["text.txt", "--out", "data", "--shard-tokens", "500"]
    for n_written, kept in ((0, False), (4, True)):
        n_left = n_written

        def append(self: ShardFile, tokens: Any, really: Any = ShardFile.append) -> None:
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise KeyboardInterrupt
            really(self, tokens)

        with monkeypatch.context() as context:
            context.setattr(ShardFile, "append", append)
            result = CliRunner().invoke(prepare_command, arguments)
        assert result.exit_code == 1
        assert ("the same command continues" in result.output) == kept
    assert "The dataset is written" in run(*arguments).output


def test_the_help_has_examples() -> None:
    help = run("--help").output
    assert "gptc prepare shakespeare --tokenizer char --out data/shakespeare" in help
