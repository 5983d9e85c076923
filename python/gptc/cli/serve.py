"""`gptc serve`: an OpenAI-compatible server and a playground."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.cli.declared import SectionedCommand, options_of
from gptc.cli.params import draft_option, model_option, quantize_option
from gptc.engine.options import CacheOptions, DeviceOptions, check_device
from gptc.errors import GptcError
from gptc.files.words import amount, pip_install
from gptc.serve.options import ServeOptions
from gptc.settings import declared, read_toml

if TYPE_CHECKING:
    from gptc.tokenizer.base import Tokenizer

_EPILOG = """\b
Examples:
  gptc serve                                        the newest model under runs/
  gptc serve -m SmolLM2-135M-Instruct.gguf          then open http://127.0.0.1:8000
  gptc serve -m gpt2 --parallel 32 --context 512
  gptc serve -m gpt2 --adapter poems=runs/poems     requests say "model": "poems"
  gptc serve -m runs/tiny --host 0.0.0.0 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{"prompt": "Once upon a time", "max_tokens": 50}'
"""


class ServeCommand(SectionedCommand):
    """Its help has sections for the address, the sequences, the limits and the security."""

    declares = (ServeOptions, DeviceOptions, CacheOptions)
    rest = "Model"
    rest_first = True


@click.command("serve", cls=ServeCommand, epilog=_EPILOG)
@model_option
@draft_option
@quantize_option
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file of options of the sections below Model; the command line wins.",
)
@click.option("--check", "checks", is_flag=True, help="Load the model, answer once, and exit.")
@options_of(ServeOptions, unset=True)
@options_of(DeviceOptions, without=("pin",))
@options_of(CacheOptions)
def serve_command(
    model: str | None,
    draft: str | None,
    device: str,
    dtype: str,
    threads: int,
    kv_dtype: str,
    quantize: str | None,
    config: Path | None,
    checks: bool,
    **given: Any,
) -> None:
    """Serve a model to OpenAI's clients, and a playground to browsers.

    The server listens on this machine alone, unless --host and --api-key-file say otherwise. On
    SIGTERM it lets running texts finish.
    """
    options = _options(config, given)
    check_device(device)
    _check_packages()
    from gptc.checkpoint.facade import load_model, on_newest
    from gptc.checkpoint.merged import AdapterSet, parse_adapters
    from gptc.checkpoint.names import model_name
    from gptc.serve.server import Server, cache_bytes, check_security, make_service

    check_security(options)  # before the weights are read
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("gptc.serve").setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that have left
    loading: dict[str, Any] = {
        "device": device, "threads": threads, "max_batch": 0, "kv_dtype": kv_dtype,
    }  # fmt: skip
    with ExitStack() as stack:

        def load(file: Any) -> Any:
            paths, names = parse_adapters(options.adapter)
            read = (lambda: AdapterSet(file, paths, names)) if paths else None
            tokenizer, lora = file.tokenizer(), {}
            if read:
                adapters = read()
                tokenizer, lora = adapters.talking(tokenizer), {"lora": adapters.lora}
            gpt = load_model(file, dtype=quantize or dtype, **loading, **lora)
            return file, tokenizer, gpt, read

        file, tokenizer, gpt, read = on_newest(model, load)
        stack.enter_context(gpt)
        guesses = None
        if draft:
            from gptc.cli.drafts import open_draft

            loading |= {"dtype": dtype}
            guesses = open_draft(stack, draft, gpt, tokenizer, options.parallel, loading)
        service = make_service(
            gpt,
            tokenizer,
            options,
            name=options.name or model_name(Path(file.path)),
            chat_template=_template(tokenizer, options.chat_template),
            draft=guesses,
            adapters=read,
        )
        scheduler = service.scheduler
        size = amount(cache_bytes(gpt, options, guesses, scheduler.n_ctx))
        click.echo(
            f"{service.name}: {scheduler.n_seq} sequences of {scheduler.n_ctx:,} tokens, {size} at "
            "most",
            err=True,
        )
        if checks:
            _answer_once(service)
            return

        server = Server(service, lambda url: click.echo(f"listening on {url}", err=True))
        with _collecting_new_objects():
            complete = server.run()
        if not complete:
            click.echo("some texts were cut off; give them longer with --drain-seconds", err=True)


@contextmanager
def _collecting_new_objects() -> Iterator[None]:
    """Garbage is sought among objects made from now on.

    Those of the program and of a large vocabulary take tens of milliseconds to look through, and
    every stream would wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _options(config: Path | None, given: dict[str, Any]) -> ServeOptions:
    """The checked options: of the command line, else of the file, else the defaults."""
    of_file = read_toml(ServeOptions, config) if config else {}
    of_line = {name: value for name, value in given.items() if value not in (None, ())}
    values = of_file | of_line
    for name, option in declared(ServeOptions).items():
        if option.kind is tuple and name in values:
            values[name] = tuple(values[name])
    options = ServeOptions(**values)
    options.check()
    return options


_PACKAGES = ("starlette", "uvicorn", "prometheus-client")


def _check_packages() -> None:
    for name in _PACKAGES:
        try:
            __import__(name.replace("-", "_"))
        except ImportError:
            raise GptcError(
                f"gptc serve needs the package {name}: {pip_install(*_PACKAGES)}"
            ) from None


def _template(tokenizer: Tokenizer, given: str | None) -> str | None:
    """The text of the chat template that is asked for; None: the model's own."""
    from gptc.cli.chat import find_template

    return None if given is None else find_template(tokenizer, given, None)


def _answer_once(service: Any) -> None:
    """Decodes a token, so that a server that starts will also answer."""
    ended, events = threading.Event(), []

    def tell(event: Any) -> None:
        events.append(event)
        if event.finish:
            ended.set()

    request = service.make_request("", {"seed": 0}, max_tokens=1)
    service.scheduler.submit(request, tell)
    ended.wait()
    service.scheduler.close()
    if events[-1].error:
        raise GptcError(f"the model does not answer: {events[-1].error}")
    click.echo("ok", err=True)
