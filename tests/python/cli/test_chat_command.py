"""`gptc infer --chat` and `--messages`: what a person types, and the files that programs give.

The class of fault: an interrupt that ends the program or its history; standard output with more
than the answer; a file or an option that is passed over without a word.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chat_templates import message
from gptc.cli import chat, interactive
from gptc.engine.config import GPTConfig
from gptc.tokenizer.marks import Marks
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_adapter, varied
from terminals import Terminal

Gptc = Callable[..., Any]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TEXT = [part for i in range(128, 256) for part in ("--logit-bias", f"{i}=-inf")]
TEXT += [part for i in range(32) for part in ("--logit-bias", f"{i}=-inf")]


@pytest.fixture
def folder(config: Callable[..., GPTConfig], tmp_path: Path) -> Path:
    """A model that was taught a template, as a checkpoint."""
    tokenizer = make_tokenizer("bytes")
    tokenizer.marks = Marks(chat_template=TEMPLATE, named_templates=(("short", "{{ 7 }}"),))
    with varied(config(block_size=256)) as model:
        model.save(tmp_path / "model", tokenizer)
    return tmp_path / "model"


def write(path: Path, *messages: Any) -> Path:
    path.write_text(json.dumps(list(messages)))
    return path


def options(folder: Path) -> list[str]:
    return [
        "infer",
        "-m",
        str(folder),
        "--seed",
        "4",
        "--dtype",
        "fp32",
        "--max-tokens",
        "8",
        *TEXT,
    ]


# ---- --messages ----


def test_the_answer_is_printed_alone(gptc: Gptc, folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "m.json", message("system", "Be brief."), message("user", "On"))
    ran = gptc(*options(folder), "--messages", file)
    plain = gptc(*options(folder), "-p", "s:Be brief.\nu:On\na:", "--no-echo")
    assert (ran.code, ran.out) == (0, plain.out)
    assert ran.err == "note: the answer is cut: --max-tokens is reached\n"
    file.write_text(json.dumps({"messages": [message("user", "On")], "model": "x"}))
    again = gptc(*options(folder), "--messages", file, "--system", "Be brief.")
    assert again.out == ran.out
    other = gptc(*options(folder), "--messages", file, "--chat-template", "short")
    assert other.out == gptc(*options(folder), "-p", "7", "--no-echo").out
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    other = gptc(*options(folder), "--messages", file, "--chat-template", template)
    assert other.out == gptc(*options(folder), "-p", "On", "--no-echo").out


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "is damaged: not JSON from byte 0 on"),
        ("[", "is damaged: not JSON"),
        ("[]", "the list of messages is empty: give at least one"),
        ("{}", "holds no list of messages; give one, such as"),
        ('"hello"', "holds no list of messages"),
        ('[{"role": "user"}]', 'message 1 has no "content"'),
        ('[{"content": "x"}]', 'message 1 has no "role"'),
        ('["x"]', "message 1 is 'x'"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": 7}', "tools are 7"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_file_of_no_messages(
    gptc: Gptc, folder: Path, tmp_path: Path, content: str, fault: str
) -> None:
    (tmp_path / "m.json").write_text(content)
    ran = gptc(*options(folder), "--messages", tmp_path / "m.json")
    assert ran.code in (1, 2)
    assert ran.out == ""
    assert fault in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (["--messages", "m.json", "-p", "x"], "-p and --messages exclude each other"),
        (["--chat", "--prompts", "x"], "--chat and --prompts exclude each other"),
        (
            ["--chat", "--messages", "-", "--prompt-file", "-"],
            "--messages and --prompt-file both read standard input",
        ),
        (["--messages", "m.json", "--prompts", "x"], "--messages and --prompts exclude"),
        (["--messages", "m.json", "--json"], "--messages and --json exclude"),
        (["--chat", "--beams", "2"], "--chat and --beams exclude"),
        (["--chat", "--num-samples", "2"], "--chat and --num-samples exclude"),
        (["--system", "x", "-p", "x"], "--system is for conversations: add --chat or"),
        (["--chat-template", "x"], "--chat-template is for conversations"),
        (["--messages", "none.json"], "cannot read the messages none.json: No such file"),
        (["--messages", "m.json", "--chat-template", "x"], "the chat template x does not exist"),
        (["--messages", "s.json", "--system", "x"], "s.json has a system message: leave out"),
    ],
)
def test_options_that_do_not_fit(
    gptc: Gptc,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    fault: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m.json", message("user", "x"))
    write(tmp_path / "s.json", message("system", "x"))
    ran = gptc(*options(folder), *given)
    assert (ran.code in (1, 2), ran.out) == (True, "")
    assert fault in ran.err


def test_a_prompt_is_a_message_to_answer(gptc: Gptc, folder: Path, tmp_path: Path) -> None:
    begin = [message("system", "Be brief."), message("user", "On"), message("assistant", "Off")]
    file = write(tmp_path / "m.json", *begin)
    whole = write(tmp_path / "w.json", *begin, message("user", "Up"))
    wanted = gptc(*options(folder), "--messages", whole)
    for given in (["-p", "Up"], ["--prompt-file", tmp_path / "up.txt"]):
        (tmp_path / "up.txt").write_text("Up\n")
        ran = gptc(*options(folder), "--chat", "--messages", file, *given)
        assert (ran.code, ran.out, ran.err) == (0, wanted.out, wanted.err)
    alone = gptc(*options(folder), "--chat", "-p", "On", "--system", "Be brief.")
    short = write(tmp_path / "s.json", *begin[:2])
    assert alone.out == gptc(*options(folder), "--messages", short).out != wanted.out
    drawn = options(folder)
    del drawn[drawn.index("--seed") : drawn.index("--seed") + 2]
    assert "seed " in gptc(*drawn, "--chat", "-p", "On").err


def test_a_model_without_a_template(gptc: Gptc, saved: Path, tmp_path: Path) -> None:
    write(tmp_path / "m.json", message("user", "x"))
    ran = gptc("infer", "-m", saved, "--messages", tmp_path / "m.json")
    assert (ran.code, ran.out) == (2, "")
    assert "the model has no chat template: give one with --chat-template FILE" in ran.err


def test_an_adapter_that_was_taught_to_talk(gptc: Gptc, saved: Path, tmp_path: Path) -> None:
    """It answers as it does with -m, also where its base has no template."""
    adapter = make_adapter(tmp_path / "talker", saved, "all", 2)
    tokenizer = make_tokenizer("bytes")
    tokenizer.marks = Marks(chat_template=TEMPLATE)
    tokenizer.save(adapter)
    sums = json.loads((adapter / "checksums.json").read_text())
    assert "gptc_tokenizer.json" not in sums
    given = ["--chat", "-p", "On", *options(adapter)[3:]]
    wanted = gptc("infer", "-m", adapter, *given)
    ran = gptc("infer", "-m", saved, "--adapter", adapter, *given)
    assert (ran.code, ran.out) == (0, wanted.out)
    plain = make_adapter(tmp_path / "plain", saved, "all", 1)
    ran = gptc("infer", "-m", saved, "--adapter", plain, "--adapter", adapter, *given)
    assert "the model has no chat template" in ran.err


# ---- --chat ----


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """lines("a", "b") are typed next; KeyboardInterrupt is a Ctrl-C."""

    def give(*typed: Any) -> None:
        coming = iter(typed)

        def line(prompt: str) -> str:
            for text in coming:
                if isinstance(text, type):
                    raise text
                return str(text)
            raise EOFError

        monkeypatch.setattr("builtins.input", line)

    return give


def test_a_conversation_of_lines(
    gptc: Gptc, folder: Path, tmp_path: Path, lines: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = tmp_path / "saved.json"
    lines(
        "", "On", "two\\", "lines", "/save", f"/save {file}", f"/save {folder}", "/help", "/fly",
        "/reset", " /a message", f"/save {file}", "/quit", "after",
    )  # fmt: skip
    ran = gptc(*options(folder), "--chat", "--system", "Be brief.")
    assert ran.code == 1  # lines of a pipe, of which three have failed
    assert "3 of 10 lines failed" in ran.err
    said = json.loads(file.read_text())
    assert [turn["role"] for turn in said] == ["system", "user", "assistant"]
    assert said[0]["content"] == "Be brief."
    assert said[1]["content"] == " /a message"
    answers = ran.out.split("\n")
    assert len(answers) == 4  # of three messages; the last is empty
    assert answers[2] == said[2]["content"]
    for text in (
        "error: /save needs the name of a file",
        f"5 messages in {file}",
        f"error: {folder} exists: give the name of a new file",
        "/reset      begin again",
        "error: unknown command /fly: /help lists them",
        "a new conversation",
    ):
        assert text in ran.err.replace("\n ", " "), ran.err
    # The saved file continues the conversation.
    lines("more", f"/save {tmp_path / 'again.json'}")
    assert gptc(*options(folder), "--chat", "--messages", file).code == 0
    assert json.loads((tmp_path / "again.json").read_text())[:3] == said


def test_asking_for_prompts_says_that_the_model_can_talk(
    gptc: Gptc, folder: Path, lines: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(interactive, "is_terminal", lambda: True)
    lines("On")
    ran = gptc(*options(folder))
    assert "note: this model was taught to talk; add --chat for that" in ran.err


def test_a_message_that_fails_does_not_end_it(
    gptc: Gptc, folder: Path, tmp_path: Path, lines: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    lines("x" * 300, "On")
    ran = gptc(*options(folder), "--chat")
    assert ran.code == 1
    assert "error: the prompt has 30" in ran.err
    assert ran.err.endswith("gptc: error: 1 of 2 lines failed: see the errors above\n")
    assert len(ran.out.strip()) == 8
    lines("x" * 300, "On")
    monkeypatch.setattr(chat, "is_terminal", lambda: True)  # where a person has seen it
    assert gptc(*options(folder), "--chat").code == 0


def test_the_oldest_messages_go_and_it_is_said_once(
    gptc: Gptc, folder: Path, tmp_path: Path, lines: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    lines(*[f"This is message number {i}." for i in range(20)])
    ran = gptc(*options(folder), "--chat")
    assert ran.err.count("the context is full: the oldest messages are left out") == 1
    assert ran.out.count("\n") == 20


def test_ctrl_c_stops_an_answer_and_twice_the_program(folder: Path, tmp_path: Path) -> None:
    arguments = ["--chat", "--max-tokens", "1000000", "--context-shift", *TEXT]
    terminal = Terminal(folder, tmp_path, *arguments)
    terminal.until("Ctrl-D quits.")
    terminal.until(">>> ")
    terminal.type("On\n")
    terminal.flows(100)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.until(">>> ")
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.until(">>> ")
    terminal.type(f"/save {tmp_path / 'said.json'}\n")
    terminal.until("2 messages in")
    terminal.until(">>> ")
    time.sleep(0.3)
    terminal.type("\x03")  # may be meant for an answer that has just ended
    terminal.until("Ctrl-C again, or Ctrl-D, quits.")
    terminal.until(">>> ")
    time.sleep(0.3)
    terminal.type("\x03")
    assert terminal.end() == 0
    assert len(json.loads((tmp_path / "said.json").read_text())[1]["content"]) > 8


def test_lines_may_come_from_a_pipe(folder: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "gptc", *options(folder), "--chat"]
    ran = subprocess.run(command, input="On\nTwo\n", capture_output=True, text=True, check=True)
    assert [len(line) for line in ran.stdout.split("\n")] == [8, 8, 0]
    assert ">>>" not in ran.stdout + ran.stderr
