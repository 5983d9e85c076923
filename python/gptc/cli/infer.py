"""`gptc infer`: text from a model, printed as it is generated."""

from __future__ import annotations

import codecs
import os
import re
import secrets
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.cli.declared import SectionedCommand, options_of
from gptc.cli.params import COUNT, draft_option, model_option, quantize_option
from gptc.cli.ranks import agreed_model, agreed_threads
from gptc.engine.options import CacheOptions, DeviceOptions, check_device
from gptc.errors import GptcError, UsageError
from gptc.files.limits import limit, read_any, refuse
from gptc.generation.options import (
    ANSWER_STOP,
    ANSWER_TOKENS,
    DEFAULT_STOP,
    ChatOptions,
    Sampling,
    TextOptions,
)
from gptc.settings import declared

if TYPE_CHECKING:
    from gptc.checkpoint.merged import AdapterSet
    from gptc.cli.writer import Writer
    from gptc.engine.model import Model
    from gptc.engine.world import World
    from gptc.formats.model_file import ModelFile
    from gptc.generation.chat import Conversation
    from gptc.tokenizer.base import Tokenizer

_EPILOG = """\b
Examples:
  gptc infer -p "Once upon a time"                  the newest model under runs/
  gptc infer                                        asks for prompts
  gptc infer -m runs/tiny-stories --temperature 0 --max-tokens 100
  gptc infer -m gpt2 -p "Alan Turing theorized that"    downloaded if not a local folder
  gptc infer -m stories15M.bin --prompt-file question.txt --num-samples 3 --json
  gptc infer -m SmolLM2-135M-Instruct.gguf --chat --system "Be brief."
  gptc infer -m SmolLM2-135M-Instruct.gguf --chat -p "What is gravity?"    one answer
  gptc infer -m SmolLM2-135M-Instruct.gguf --messages question.json > answer.txt
  gptc infer --prompts questions.jsonl > answers.jsonl
  mpirun -n 4 gptc infer --prompts questions.jsonl      the same answers, by four processes
  gptc infer -p "Her name is" --regex " [A-Z][a-z]+[.]"    text that matches
  echo "The king" | gptc infer -m runs/tiny-shakespeare
"""


def _once(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> str | None:
    """The prompt. UsageError for several: click would silently take the last."""
    if len(given) > 1:
        raise UsageError("-p is given twice: put several prompts into a file for --prompts")
    return given[0] if given else None


class InferCommand(SectionedCommand):
    """Its help has sections for the text, the sampling and the device."""

    declares = (ChatOptions, TextOptions, Sampling, DeviceOptions, CacheOptions)
    rest = "Model, prompt and output"
    rest_first = True


@click.command("infer", cls=InferCommand, epilog=_EPILOG)
@model_option
@click.option(
    "--adapter",
    "adapters",
    metavar="[NAME=]DIR",
    type=click.Path(),
    multiple=True,
    help="Adapter (LoRA) of the model. May be repeated: the first one is used, or the one that a "
    'line of --prompts names, such as {"adapter": "NAME"}.',
)
@click.option(
    "-p", "--prompt", metavar="TEXT", multiple=True, callback=_once,
    help="Prompt to continue; with --chat, a message to answer.",
)  # fmt: skip
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with the prompt; - = standard input.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSON lines of prompts, such as {"prompt": …}; - = standard input. '
    "The answers are JSON lines too.",
)
@options_of(ChatOptions)
@options_of(TextOptions)
@options_of(Sampling, defaults={"seed": None})
@click.option("--beams", type=COUNT, metavar="N", help="Beam search with N beams.")
@draft_option
@options_of(DeviceOptions, without=("pin",))
@options_of(CacheOptions)
@quantize_option
@click.option(
    "--batch-size",
    type=COUNT,
    default=16,
    metavar="N",
    help="Samples decoded at a time with --prompts.  [16]",
)
@click.option("--no-echo", is_flag=True, help="Print the continuation without the prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print the samples as one JSON object.")
@click.option("--raw", is_flag=True, help="Write raw bytes only, for models of binary data.")
@click.pass_context
def infer_command(
    context: click.Context,
    /,
    model: str | None,
    adapters: tuple[str, ...],
    prompt: str | None,
    prompt_file: Path | None,
    prompts: Path | None,
    beams: int | None,
    draft: str | None,
    device: str,
    dtype: str,
    threads: int,
    kv_dtype: str,
    quantize: str | None,
    batch_size: int,
    no_echo: bool,
    as_json: bool,
    raw: bool,
    **given: Any,
) -> None:
    """Continue a text with a trained model.

    The prompt comes from -p, --prompt-file or standard input. Without one, gptc asks for prompts on
    a terminal; elsewhere the model begins a new document. The text goes to standard output, all
    else to standard error. With --chat or --messages, a model that was taught to talk answers; with
    --chat and a prompt, once.
    """
    from gptc.cli.counted import TAKEN, refuse_others, write_samples
    from gptc.cli.interactive import is_terminal
    from gptc.engine.world import join
    from gptc.eval.ngram_file import is_ngrams

    talk = ChatOptions(**{name: given.pop(name) for name in declared(ChatOptions)})
    conversing = talk.chat or talk.messages is not None
    world = join()
    world.set_timeout(0)  # ranks work for as long as they need; a starter ends those that are left
    random_seed = given["seed"] is None and given["temperature"] > 0 and not beams
    options = world.together(lambda: _checked(context, world, talk, given))
    has_prompt = prompt is not None or prompt_file is not None or prompts is not None
    asks = not (has_prompt or as_json or raw or conversing) and is_terminal()
    asked = talk.chat and has_prompt
    text = ""
    if asked or not (prompts or asks or conversing):
        text = _read_prompt(prompt, prompt_file, as_bytes=raw)
    if model is not None and is_ngrams(model):
        refuse_others(context, TAKEN)
        write_samples(Path(model), text, options, as_json, not no_echo, random_seed)
        return
    begin = _read_messages(talk, text if asked else None)
    from gptc.checkpoint.facade import on_newest
    from gptc.cli.writer import Writer

    if world.size > 1:
        options = {**options, "sampling": _agreed_seed(world, options["sampling"])}
    threads, model = agreed_threads(world, threads), agreed_model(world, model)
    # Only sessions compute here: the model needs no memory for batches.
    loading = {"device": device, "threads": threads, "max_batch": 0, "kv_dtype": kv_dtype}

    def load(file: ModelFile) -> tuple[ModelFile, Tokenizer, Model, AdapterSet | None]:
        tokenizer, several = file.tokenizer(), _adapters(file, adapters)
        if several:
            tokenizer = several.tokenizer(tokenizer)
        if conversing:  # before the weights are read
            begin["chat_template"] = _template(tokenizer, talk, begin)
        gpt = _load(file, tokenizer, several, {"dtype": quantize or dtype, **loading})
        return file, tokenizer, gpt, several

    with ExitStack() as stack:
        stack.enter_context(world.ending_together())
        file, tokenizer, gpt, several = world.together(lambda: on_newest(model, load))
        stack.enter_context(gpt)
        writer = Writer(gpt, tokenizer, file.path, options, beams, random_seed)
        if draft:
            from gptc.cli.drafts import open_draft

            n_seq = batch_size if prompts else options["num_samples"]
            loading["dtype"] = dtype
            opened = world.together(
                lambda: open_draft(stack, draft, gpt, tokenizer, n_seq, loading)
            )
            writer.draft = opened.make(0)
        if conversing:
            from gptc.generation.chat import Conversation

            given = {**begin, "system": talk.system, "draft": writer.draft, **options}
            _converse(Conversation(gpt, tokenizer, **given), talk.chat and not asked, random_seed)
        elif prompts:
            from gptc.cli.prompts import answer

            answer(prompts, gpt, tokenizer, options, batch_size, writer.draft, several, world)
        elif asks:
            _ask(writer, tokenizer)
        elif as_json:
            writer.print_json(text)
        elif raw:
            writer.write_raw(text, echo=not no_echo)
        else:
            writer.write(text, echo="" if no_echo else text)


def _checked(
    context: click.Context, world: World, talk: ChatOptions, given: dict[str, Any]
) -> dict[str, Any]:
    """The checked options of `make_request`. UsageError for those that exclude each other.

    `given` are the options of a text and of sampling.
    """
    params = context.params
    by_line, beams = params["prompts"] is not None, params["beams"] is not None
    conversing = talk.chat or talk.messages is not None
    if world.size > 1:
        _check_ranks(world, params["prompts"], params["device"])
    check_device(params["device"])
    outputs = {"--json": params["as_json"], "--raw": params["raw"], "--prompts": by_line}
    _check_outputs(outputs, given)
    as_json = params["as_json"] or by_line
    _exclusive({"--no-echo": params["no_echo"], "--json or --prompts": as_json})
    if conversing:
        _check_talk(context, talk, outputs | {"--no-echo": params["no_echo"], "--beams": beams})
    elif talk.system is not None or talk.chat_template is not None:
        name = "--chat-template" if talk.system is None else "--system"
        raise UsageError(f"{name} is for conversations: add --chat or --messages FILE")
    if beams:
        _refuse_with_beams(context, outputs | {"--draft": params["draft"] is not None})
    if conversing and _is_default(context, "max_tokens"):
        given["max_tokens"] = ANSWER_TOKENS
    stop = () if params["raw"] else ANSWER_STOP if conversing else DEFAULT_STOP
    options = _options(given, stop)
    prompts = {"-p": "prompt", "--prompt-file": "prompt_file", "--prompts": "prompts"}
    named = {flag: params[name] is not None for flag, name in prompts.items()}
    _exclusive(named | {"--messages": conversing and not talk.chat})
    if talk.messages == "-" == str(params["prompt_file"]):
        raise UsageError("--messages and --prompt-file both read standard input: name a file")
    return options


def _template(tokenizer: Tokenizer, talk: ChatOptions, begin: dict[str, Any]) -> Any:
    """The chat template of a conversation with these tools."""
    from gptc.cli.chat import find_template

    return find_template(tokenizer, talk.chat_template, begin.get("tools"))


def _adapters(file: ModelFile, given: tuple[str, ...]) -> AdapterSet | None:
    from gptc.checkpoint.merged import AdapterSet, parse_adapters

    return AdapterSet(file, *parse_adapters(given)) if given else None


def _load(
    file: ModelFile, tokenizer: Tokenizer, several: AdapterSet | None, options: dict[str, Any]
) -> Model:
    """The model, which uses the first adapter. `options` are those of `load_model`."""
    from gptc.checkpoint.facade import load_model

    with _made_ready(tokenizer):
        gpt = load_model(file, **options, **({"lora": several.lora} if several else {}))
    if several:
        several.use(gpt, several.names[0])
    return gpt


def _ask(writer: Writer, tokenizer: Tokenizer) -> None:
    """Continues each prompt that is typed."""
    from gptc.cli.interactive import converse

    if tokenizer.marks.templates:
        click.echo("note: this model was taught to talk; add --chat for that", err=True)
    converse(writer.answer)


def _check_ranks(world: World, prompts: Path | None, device: str) -> None:
    """GptcError for what several ranks cannot share."""
    world.check_device(device, "answer")
    if prompts is None or str(prompts) == "-":
        raise GptcError(
            f"{world.size} ranks share the lines of a file: give one with --prompts FILE, or leave "
            "out mpirun"
        )


def _agreed_seed(world: World, sampling: Sampling) -> Sampling:
    return replace(sampling, seed=world.gather_json(sampling.seed)[0])


def _check_talk(context: click.Context, talk: ChatOptions, others: dict[str, bool]) -> None:
    """Raises UsageError for options that a conversation cannot use."""
    kind = "--chat" if talk.chat else "--messages"
    for name, is_given in others.items():
        _exclusive({kind: True, name: is_given})
    _exclusive({kind: True, "--num-samples": context.params["num_samples"] > 1})
    _exclusive({kind: True, "--logprobs": context.params["logprobs"] is not None})


def _read_messages(talk: ChatOptions, question: str | None) -> dict[str, Any]:
    """The messages and tools that a conversation begins with, the question last.

    UsageError for two system messages.
    """
    begin = {}
    if talk.messages is not None:
        from gptc.cli.chat import read_messages

        begin = read_messages(talk.messages)
    if begin and talk.system is not None and begin["messages"][0]["role"] == "system":
        raise UsageError(f"{talk.messages} has a system message: leave out --system")
    if question is not None:
        asked = {"role": "user", "content": question}
        begin["messages"] = [*begin.get("messages", ()), asked]
    return begin


def _converse(conversation: Conversation, at_terminal: bool, random_seed: bool) -> None:
    """A conversation at the terminal, or the answer to its last message."""
    from gptc.cli.chat import print_answer, talk

    if at_terminal:
        talk(conversation)
    else:
        print_answer(conversation, conversation.seed if random_seed else None)


def _is_default(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == click.core.ParameterSource.DEFAULT


def _options(given: dict[str, Any], stop: tuple[str, ...]) -> dict[str, Any]:
    """The checked options of `make_request`."""
    if given["seed"] is None:
        given["seed"] = secrets.randbits(31)
    sampling = Sampling(**{name: given[name] for name in declared(Sampling)})
    sampling.check()
    texts = {name: given[name] for name in declared(TextOptions)}
    texts["stop"] = tuple(map(_unescaped, given["stop"])) or stop
    for kind in ("grammar", "json_schema"):
        if texts[kind] is not None and not _is_pattern(kind, texts[kind]):
            what = "JSON schema" if kind == "json_schema" else kind
            texts[kind] = _read_pattern(Path(texts[kind]), what)
    for kind in TextOptions.PATTERNS:
        if texts[kind] is not None:
            from gptc.generation.constraint import check_pattern

            check_pattern(kind, texts[kind])
    TextOptions(**texts).check()
    return {**texts, "sampling": sampling}


def _unescaped(text: str) -> str:
    """A stop string in which \\n, \\r, \\t and \\\\ have their usual meaning."""
    escapes = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda m: escapes[m[1]], text)


def _is_pattern(kind: str, given: str) -> bool:
    """Whether a grammar or JSON schema is given as it is, not as the name of its file."""
    return "::=" in given if kind == "grammar" else given.lstrip().startswith("{")


def _read_pattern(path: Path, what: str) -> str:
    """The text of a file of a grammar or JSON schema."""
    try:
        with path.open("rb") as file:
            data = file.read(limit("pattern") + 1)
    except OSError as error:
        raise GptcError(f"cannot read the {what} {path}: {error.strerror}") from None
    if len(data) > limit("pattern"):
        raise refuse(f"the {what} {path}", "pattern", "simplify it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GptcError(
            f"byte {error.start} of the {what} {path} is not UTF-8: convert the file to UTF-8"
        ) from None


@contextmanager
def _made_ready(tokenizer: Tokenizer) -> Iterator[None]:
    """Loads the tokenizer's tables in a thread while the block reads the weights."""

    def use() -> None:
        with suppress(GptcError):  # it is raised again, and reported, at the first real use
            tokenizer.encode(" ")

    thread = threading.Thread(target=use)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _check_outputs(outputs: dict[str, bool], given: dict[str, Any]) -> None:
    """Raises UsageError for options that exclude each other."""
    _exclusive(outputs)
    flags = {name: declared(TextOptions)[name].flag for name in TextOptions.PATTERNS}
    _exclusive({f"--{flag}": given[name] is not None for name, flag in flags.items()})
    if given["logprobs"] is not None and not (outputs["--json"] or outputs["--prompts"]):
        raise UsageError("--logprobs needs JSON output: add --json, or use --prompts")
    if outputs["--raw"] and given["num_samples"] > 1:
        raise UsageError("--raw writes one sample: leave out --num-samples")
    if outputs["--raw"] and given["stop"]:
        raise UsageError("--raw writes bytes and takes no stop strings: leave out --stop")


def _refuse_with_beams(context: click.Context, outputs: dict[str, bool]) -> None:
    """Raises UsageError for given options that a beam search cannot use."""
    for name in ("--draft", "--prompts", "--raw"):
        _exclusive({"--beams": True, name: outputs[name]})
    for name, declaration in declared(TextOptions).items():
        if name in TextOptions.PATTERNS:
            _exclusive({"--beams": True, f"--{declaration.flag}": bool(context.params[name])})
    for name, declaration in declared(Sampling).items():
        typed = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if typed and name not in ("bias", "seed"):
            raise UsageError(
                f"--beams searches for the likeliest text: leave out --{declaration.flag}"
            )


def _exclusive(given: dict[str, bool]) -> None:
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} exclude each other: give one of them")


def _read_prompt(prompt: str | None, file: Path | None, as_bytes: bool = False) -> str:
    """The prompt. `as_bytes` keeps a byte-order mark."""
    if prompt is not None:
        return prompt
    stdin = file is not None and str(file) == "-"
    if file is None and not _is_piped():
        return ""
    try:
        if file is None or stdin:
            data = read_any(sys.stdin.buffer, "the prompt", "prompt")
        else:
            with file.open("rb") as opened:
                data = read_any(opened, "the prompt", "prompt")
    except OSError as error:
        raise GptcError(f"cannot read the prompt {file}: {error.strerror}") from error
    # A final newline comes from the tool that wrote the file, not from the prompt. Bytes that are
    # not UTF-8 are kept for tokenizers that can express them.
    if not as_bytes:
        data = data.removeprefix(codecs.BOM_UTF8)
    return data.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file; a terminal, a socket or a closed one is not."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
