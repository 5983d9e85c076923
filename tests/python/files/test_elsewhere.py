"""Options of other programs: each answer names an option that some command has."""

from __future__ import annotations

import click
import pytest

from gptc.cli import COMMANDS, cli
from gptc.files.elsewhere import _NAMES, as_typed, instead, meant


def _known() -> dict[str, set[str]]:
    ctx = click.Context(cli)
    commands = {name: cli.get_command(ctx, name) for name in COMMANDS}
    return {
        name: {opt for option in command.params for opt in option.opts}
        for name, command in commands.items()
        if command is not None
    }


def test_each_answer_is_an_option() -> None:
    every = set().union(*_known().values())
    for name, there in _NAMES.items():
        assert set(there) <= every, name
        assert not all(name in known for known in _known().values()), name


def test_no_answer_names_an_option_that_the_command_lacks() -> None:
    for known in _known().values():
        for name in _NAMES:
            answer = instead(name, known) or ""
            assert not answer.startswith("use ") or answer[4:] in known


def test_a_method_is_told_by_its_option() -> None:
    known = _known()["finetune"]
    assert instead("--method", known) == "--dpo learns from chosen and rejected answers"
    assert instead("--beta", known) == "use --dpo-beta"


def test_the_whole_word_is_named() -> None:
    assert as_typed("-n", ["-p", "now", "-ngl", "99"]) == "-ngl"
    assert as_typed("-n", ["-p", "-5", "-n", "99"]) == "-n"
    assert as_typed("--temp", ["--temp=1"]) == "--temp"


@pytest.mark.parametrize(
    ("name", "known", "here"),
    [
        ("max_iters", ("minutes", "steps"), "steps"),
        ("learning_rate", ("min_lr", "lr"), "lr"),
        ("eval_interval", ("eval_batches", "eval_every"), "eval_every"),
        ("repeat_penalty", ("frequency_penalty", "repetition_penalty"), "repetition_penalty"),
        ("temp", ("top_k", "temperature"), "temperature"),
        ("shares", ("share",), "share"),
        ("do_sample", ("seed", "stop"), None),
    ],
)
def test_a_name_of_a_file_or_of_python(name: str, known: tuple[str, ...], here: str | None) -> None:
    assert meant(name, known) == here
