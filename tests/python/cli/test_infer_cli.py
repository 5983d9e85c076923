"""`gptc infer` beyond one prompt: JSON lines, log-probabilities, raw bytes, drafts, a terminal."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.cli.interactive import converse
from gptc.engine.config import GPTConfig
from gptc.errors import EngineError, GptcError
from gptc.generation.decoder import Generation, generate
from gptc.generation.options import Sampling
from gptc.tokenizer.base import Tokenizer

Config = Callable[..., GPTConfig]


@pytest.fixture
def infer(gptc: Callable[..., Any], saved: Path) -> Callable[..., Any]:
    return lambda *arguments: gptc("infer", "-m", saved, "--dtype", "fp32", "--seed", 4, *arguments)


# ---- many prompts ----


def test_prompts_come_back_in_order_with_their_texts(
    infer: Callable[..., Any], writer: Model, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines: list[Any] = [
        {"prompt": "Once", "max_tokens": 12, "id": "a"},
        "just a text",
        {"prompt": "short", "max_tokens": 2, "num_samples": 3, "note": {"kept": [1, "é"]}},
        {"prompt": "own", "temperature": 0, "seed": 77, "max_tokens": 9},
        {"prompt": ""},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    ran = infer("--prompts", file, "--max-tokens", 5, "--batch-size", 2)
    assert (ran.code, ran.err) == (0, "")
    answers = [json.loads(line) for line in ran.out.splitlines()]
    seeds = [4, 5, 6, 77, 10]
    for line, answer, seed in zip(lines, answers, seeds, strict=True):
        given = {"prompt": line} if isinstance(line, str) else line
        samples = answer.pop("samples")
        assert answer == {**given, "seed": seed}
        expected = generate(
            writer, tokenizer, given["prompt"], max_tokens=given.get("max_tokens", 5), seed=seed,
            num_samples=given.get("num_samples", 1), temperature=given.get("temperature", 0.7),
        )  # fmt: skip
        assert [s["text"] for s in samples] == expected
        assert {s["finish"] for s in samples} == {"length"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"text": "x"}', 'no "prompt"'),
        ('{"prompt": 5}', "prompt is 5; it must be a text"),
        ("5", 'no "prompt"'),
        ('{"prompt": "x", "max_tokens": -1}', "max_tokens is -1; it must be at least 1"),
        ('{"prompt": "x", "max_tokens": 1000.0}', "max_tokens is 1000.0; it must be a whole"),
        ('{"prompt": "x", "logprobs": -1}', "logprobs is -1; it must be 0 or more"),
        (
            '{"prompt": "x", "max_tokens": "many"}',
            "max_tokens is 'many'; it must be a whole number",
        ),
        ('{"prompt": "x", "top_p": 7}', "top_p is 7"),
        ('{"prompt": "x", "num_samples": 0}', "num_samples is 0"),
        ('{"prompt": "x", "stop": [1]}', "stop must be a list of texts"),
        ('{"prompt": "x", "top_k": 99999999999}', "top_k is 99999999999"),
        ('{"prompt": "x", "temperature": 1%s}' % ("0" * 400), "too large"),
        ('{"prompt": "x", "temperature": 1e39}', "temperature is 1e+39"),
        ('{"prompt": "x", "top_p": 1e-50}', "top_p is 1e-50"),
        ('{"prompt": "\\ud800"}', "U+D800"),
        (json.dumps({"prompt": "x" * 60}), "the prompt has 60 tokens"),
    ],
)
def test_a_bad_line_stops_no_other(
    infer: Callable[..., Any], tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n')
    ran = infer("--prompts", file, "--max-tokens", 3)
    assert ran.code == 1
    assert "1 of 3 prompts failed" in ran.err
    first, bad, last = [json.loads(answer) for answer in ran.out.splitlines()]
    assert [len(answer["samples"]) for answer in (first, last)] == [1, 1]
    assert message in bad["error"]
    assert "samples" not in bad


def test_prompts_that_cannot_be_read(infer: Callable[..., Any], tmp_path: Path) -> None:
    ran = infer("--prompts", tmp_path / "nowhere")
    assert (ran.code, ran.out) == (1, "")
    assert "cannot read the prompts" in ran.err
    (tmp_path / "odd").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\xff"}\n\n')
    ran = infer("--prompts", tmp_path / "odd", "--max-tokens", 2)
    first, second = [json.loads(line) for line in ran.out.splitlines()]
    assert len(first["samples"]) == 1
    assert "byte 12 of the line is no UTF-8" in second["error"]


def test_answers_can_be_asked_again(infer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "one").write_text('{"prompt": "a", "note": "\\udc80 é"}\n"b"\n')
    first = infer("--prompts", tmp_path / "one", "--max-tokens", 5)
    (tmp_path / "two").write_text(first.out)
    again = infer("--prompts", tmp_path / "two", "--max-tokens", 5, "--seed", 99)
    assert (again.code, again.out) == (0, first.out)


# ---- what is printed ----


def test_json_with_log_probabilities(infer: Callable[..., Any]) -> None:
    ran = infer("-p", "a", "--max-tokens", 4, "--json", "--logprobs", 2)
    (sample,) = json.loads(ran.out)["samples"]
    assert len(sample["logprobs"]) == sample["tokens"] == 4
    for entry in sample["logprobs"]:
        assert entry["logprob"] <= entry["top"][0]["logprob"] <= 0
        assert len(entry["top"]) == 2
        assert set(entry) == {"id", "token", "logprob", "top"}


def test_a_line_may_ask_for_log_probabilities(infer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"prompt": "a", "logprobs": 1}\n"a"\n')
    ran = infer("--prompts", tmp_path / "p", "--max-tokens", 3)
    asked, plain = (json.loads(line)["samples"][0] for line in ran.out.splitlines())
    assert [len(entry["top"]) for entry in asked["logprobs"]] == [1, 1, 1]
    assert "logprobs" not in plain


def test_raw_bytes_are_nothing_but_bytes(
    saved: Path, writer: Model, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    generation = Generation(
        writer, tokenizer, "\udcff\n", max_tokens=30, sampling=Sampling(2.0, seed=4), stop=()
    )
    assert list(generation)
    (tmp_path / "prompt").write_bytes(b"\xff\n\n")  # of which the last is the file's
    command = [
        sys.executable, "-m", "gptc", "infer", "-m", saved, "--prompt-file", tmp_path / "prompt",
        "--raw", "--max-tokens", "30", "--temperature", "2", "--seed", "4", "--dtype", "fp32",
    ]  # fmt: skip
    ran = subprocess.run([str(part) for part in command], capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (b"\xff\n" + bytes(generation.samples[0].tokens), b"")
    command[command.index("30")] = "300"
    ran = subprocess.run([str(part) for part in command], capture_output=True, check=True)
    assert b"note: the model's context of 48 tokens is full" in ran.stderr


def test_beams_are_listed_best_first(infer: Callable[..., Any]) -> None:
    common = ("-p", "On", "--max-tokens", 6, "--beams", 4)
    samples = json.loads(infer(*common, "--num-samples", 3, "--json").out)["samples"]
    scores = [sample["score"] for sample in samples]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert infer(*common).out == f"On{samples[0]['text']}\n"


def test_a_draft_writes_the_same(infer: Callable[..., Any], saved: Path) -> None:
    common = ("-p", "Once", "--max-tokens", 30)
    plain = infer(*common).out
    assert infer(*common, "--draft", saved).out == plain
    assert infer(*common, "--draft", "ngram").out == plain


def test_a_context_that_shifts(infer: Callable[..., Any]) -> None:
    common = ("-p", "Once", "--max-tokens", 100, "--json")
    assert json.loads(infer(*common).out)["samples"][0]["finish"] == "context"
    shifted = json.loads(infer(*common, "--context-shift").out)["samples"][0]
    assert (shifted["finish"], shifted["tokens"]) == ("length", 100)


def test_a_full_context_is_no_silent_end(infer: Callable[..., Any]) -> None:
    ran = infer("-p", "Once", "--max-tokens", 100)
    words = "note: the model's context of 48 tokens is full"
    shift = ": --context-shift goes on from its newer half\n"
    assert (ran.code, ran.err) == (0, words + shift)
    assert infer("-p", "Once", "--max-tokens", 100, "--beams", 2).err == f"{words}\n"
    assert infer("-p", "Once", "--max-tokens", 100, "--context-shift").err == ""
    ran = infer("-p", "x" * 60)
    assert (ran.code, ran.out) == (1, "")
    assert "or go on from its end with --context-shift" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x", "-p", "y"], "-p is given twice: put several prompts into a file"),
        (["-p", "x", "--prompts", "y"], "-p and --prompts exclude each other"),
        (["--json", "--raw"], "--json and --raw exclude each other"),
        (["-p", "x", "--logprobs", "2"], "--logprobs are part of JSON"),
        (["-p", "x", "--raw", "--num-samples", "2"], "--raw writes one sample"),
        (["-p", "x", "--raw", "--stop", "y"], "has no stop strings"),
        (["-p", "x", "--beams", "2", "--draft", "ngram"], "--beams and --draft exclude"),
        (["-p", "x", "--beams", "2", "--num-samples", "3"], "2 beams cannot give 3 samples"),
        (["-p", "x", "--beams", "2", "--context-shift"], "leave out --context-shift"),
        (["-p", "x", "--beams", "2", "--top-k", "3"], "leave out --top-k"),
        (["-p", "x", "--top-k", "9999999999"], "top-k is 9999999999"),
        (["-p", "x", "--logit-bias", "5"], "no token with a number"),
        (["-p", "x", "--logit-bias", "5=inf"], "no finite number"),
        (["-p", "x", "--logit-bias", "999=1"], "token 999; the vocabulary has 256"),
        (["-p", "x", "--typical-p", "0"], "typical-p is 0.0"),
        (["-p", "x", "--repetition-penalty", "0"], "repetition-penalty is 0.0"),
        (["-p", "x", "--presence-penalty", "nan"], "presence-penalty is nan"),
    ],
)
def test_contradictions_are_refused(
    infer: Callable[..., Any], arguments: list[str], message: str
) -> None:
    ran = infer(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_a_session_that_does_not_fit(writer: Model) -> None:
    with pytest.raises(EngineError, match=r"needs .* GB, .* GB more than are free; take fewer"):
        writer.session(5_000_000)


# ---- a terminal ----


class Terminal:
    """`gptc infer` in a terminal of its own."""

    def __init__(self, saved: Path, home: Path, *arguments: str) -> None:
        pty = pytest.importorskip("pty")
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which may be ignored here
            os.environ["XDG_STATE_HOME"] = str(home)
            os.environ["TERM"] = "dumb"
            command = [sys.executable, "-m", "gptc", "infer", "-m", str(saved), "--seed", "4",
                       "--dtype", "fp32", "--temperature", "0", *arguments]  # fmt: skip
            os.execv(sys.executable, command)
        self.seen = ""

    def until(self, text: str, seconds: float = 30) -> str:
        """Everything up to and with `text`, as it is shown next."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:
                    assert text in self.seen, f"it ended: {self.seen!r}"
        at = self.seen.index(text) + len(text)
        shown, self.seen = self.seen[:at], self.seen[at:]
        return shown.replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation(saved: Path, tmp_path: Path) -> None:
    terminal = Terminal(saved, tmp_path, "--max-tokens", "8")
    terminal.until("Ctrl-D ends.")
    for typed in ("On\n", "\n", "\n"):  # an empty line goes on
        terminal.until(">>> ")
        terminal.type(typed)
        assert "8 tokens" in terminal.until("tokens/s")
    terminal.until(">>> ")
    terminal.type("two\\\n")
    terminal.until("... ")
    terminal.type("lines\n")
    assert "8 tokens" in terminal.until("tokens/s")
    terminal.until(">>> ")
    terminal.type("y" * 60 + "\n")
    terminal.until("error: the prompt has 60 tokens")
    terminal.until(">>> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "On" in (tmp_path / "gptc" / "history").read_text()


def test_a_conversation_survives_errors_and_interrupts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    typed = iter(["", "one\\", "two", "", "wrong", "slow", "last"])
    asked: list[str] = []

    def line(prompt: str) -> str:
        for text in typed:
            return text
        raise EOFError

    def answer(prompt: str) -> None:
        asked.append(prompt)
        if prompt == "wrong":
            raise GptcError("too long")
        if prompt == "slow":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", line)
    converse(answer)
    assert asked == ["", "one\ntwo", "", "wrong", "slow", "last"]
    assert "error: too long" in capsys.readouterr().err


def test_an_interrupt_stops_the_text_and_not_the_program(saved: Path, tmp_path: Path) -> None:
    terminal = Terminal(saved, tmp_path, "--max-tokens", "1000000", "--context-shift")
    terminal.until(">>> ")
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.3)  # a person's pause: Python overlooks what comes before it waits
    terminal.type("\x03")
    terminal.until(">>> ")
    terminal.type("On\n")
    time.sleep(0.5)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.until(">>> ")
    terminal.type("\x04")
    assert terminal.end() == 0
