"""The command line: `gptc COMMAND`. A command's module is imported on first use."""

from __future__ import annotations

import codecs
import difflib
import io
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from gptc._version import __version__
from gptc.errors import GptcError, UsageError

# Name: module, attribute, help. The help is here so that `gptc --help` imports no command.
COMMANDS = {
    "prepare": ("gptc.cli.prepare", "prepare_command", "Turn any text into token shards."),
    "train": ("gptc.cli.train", "train_command", "Train a model, resume a run, or fine-tune."),
    "plan": ("gptc.cli.plan", "plan_command", "Print the memory and time of a training run."),
    "finetune": ("gptc.cli.finetune", "finetune_command", "Fine-tune a model on conversations."),
    "infer": ("gptc.cli.infer", "infer_command", "Generate text with a trained model."),
    "serve": ("gptc.cli.serve", "serve_command", "Serve a model to OpenAI's clients."),
    "eval": ("gptc.cli.evaluate", "eval_command", "Measure a model's loss on a dataset."),
    "ngram": ("gptc.cli.ngram", "ngram_command", "Count n-grams, the yardstick of a model."),
    "speedrun": ("gptc.cli.speedrun", "speedrun_command", "Time training to a loss."),
    "plot": ("gptc.cli.plot", "plot_command", "Draw the curves of training runs."),
    "info": ("gptc.cli.info", "info_command", "Describe a run, checkpoint, model or dataset."),
    "import": ("gptc.cli.interchange", "import_command", "Import a model from another program."),
    "export": ("gptc.cli.interchange", "export_command", "Export a model to another program."),
    "verify": ("gptc.cli.interchange", "verify_command", "Check a model or dataset for damage."),
    "bench": ("gptc.cli.bench", "bench_command", "Measure training and inference speed."),
    "doctor": ("gptc.cli.doctor", "doctor_command", "Test gptc on this machine's devices."),
}
# Commands of other programs.
_ELSEWHERE = {
    **dict.fromkeys(("chat", "talk"), "infer -m MODEL --chat"),
    **dict.fromkeys(("run", "generate", "complete", "sample"), "infer -m MODEL -p TEXT"),
    **dict.fromkeys(("lora", "sft", "tune"), "finetune -m MODEL --data FILE"),
    "quantize": "export -m MODEL --to gguf --dtype q4_k_m --out FILE",
    "convert": "import or gptc export",
    "merge": "export -m ADAPTER --merge --to FORMAT --out PATH",
    "tokenize": "prepare",
    "pull": "import NAME --out CKPT",
}

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class LazyGroup(click.Group):
    """A command group that imports a command on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Names the closest command in the error for an unknown one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(COMMANDS)}"
            if name in _ELSEWHERE:
                hint = f"; use gptc {_ELSEWHERE[name]}"
            ctx.fail(f"unknown command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, row[2]) for name, row in COMMANDS.items()])


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    click.echo(f"gptc {__version__}")
    from gptc.engine import library

    try:
        lib = library.load()
        click.echo(
            f"libgpt.so {library.version()}, ABI {lib.lib.gpt_abi_version()}, "
            f"CPU level {library.cpu_level()}, {lib.path}"
        )
    except GptcError as error:
        click.echo(f"libgpt.so: {error}")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings=CONTEXT,
    invoke_without_command=True,
    epilog="Start with gptc train, then gptc infer. Each command's --help has examples.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of gptc and libgpt.so.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Train, fine-tune and run small GPTs without PyTorch."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(2)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    # --debug is accepted after the command too: users append it to the line that failed.
    debug = "--debug" in args
    if debug:
        args = ["--debug", *(arg for arg in args if arg != "--debug")]
    _open_closed_streams()
    _print_every_character()
    try:
        code = run(args, debug)
    except BrokenPipeError:  # the reader is gone, as `head` is after ten lines
        _discard_output()
        sys.exit(1)
    try:
        sys.stdout.flush()
    except OSError:  # `run` has said so; Python would complain again when it flushes at exit
        _discard_output()
        code = code or 1
    sys.exit(code)


def _discard_output() -> None:
    """Sends the rest of standard output nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Replaces closed standard streams (`>&-`), which Python sets to None, by /dev/null."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def _print_every_character() -> None:
    """Lets output take characters outside its encoding, as their UTF-8 bytes.

    A run must not fail at its end, when it prints a sample or the name of a file, and a printed
    command must name the file.
    """
    codecs.register_error("gptc.utf8", _as_utf8)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="gptc.utf8")


def _as_utf8(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    try:
        return text.encode("utf-8", "surrogateescape"), error.end  # a byte of a name stays a byte
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace"), error.end


def run(args: list[str], debug: bool = False) -> int:
    """Runs the command line and returns the exit code."""
    try:
        result: Any = cli.main(args=args, prog_name="gptc", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exit:
        return int(exit.exit_code)
    except click.ClickException as error:
        if debug:
            raise
        if _is_first(args):
            _print_error(error.format_message(), error)
        return 2 if isinstance(error, click.UsageError) else 1
    except GptcError as error:
        if debug:
            raise
        if not error.silent:
            _print_error(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, click.exceptions.Abort) as error:
        cause = error.__cause__ or error  # click raises Abort from a KeyboardInterrupt
        click.echo(" ".join(["interrupted", *map(str, cause.args)]), err=True)
        return 130
    except BrokenPipeError:
        raise
    except MemoryError:
        if debug:
            raise
        _print_error("out of memory; close other programs, or use a smaller model or file")
        return 1
    except OSError as error:
        if debug:
            raise
        # Errors of streams and of files that are already open carry no name.
        where = error.filename or "standard output, or a file"
        _print_error(f"{where}: {error.strerror or error}")
        return 1
    except Exception as error:
        if debug:
            raise
        _print_error(
            f"unexpected {type(error).__name__}: {error}; please report it with the output of "
            "the same command and --debug"
        )
        return 1


_JOINING = ("train", "finetune", "eval", "infer", "prepare")


def _is_first(args: Sequence[str]) -> bool:
    """Whether this process prints its error: not that of later ranks of a job, which fail alike.

    Others wait a moment: their starter ends all when one ends.
    """
    from gptc.engine.launch import launched

    place = launched() if args[:1] and args[0] in _JOINING else None
    if place is None or place.rank == 0:
        return True
    time.sleep(2)
    return False


def _print_error(message: str, error: click.ClickException | None = None) -> None:
    click.echo(f"gptc: error: {message}", err=True)
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(f"see: {error.ctx.command_path} --help", err=True)
