"""The options of `gptc serve`, declared once: see gptc.settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gptc.settings import check, option


@dataclass(frozen=True)
class ServeOptions:
    """The options for the address, the sequences, the limits and the security of a server."""

    SECTIONS: ClassVar[tuple[str, ...]] = ("Address", "Sequences", "Limits", "Security")

    host: str = option("127.0.0.1", "Address to listen on.", section="Address", metavar="HOST")
    port: int = option(
        8000, "Port to listen on; 0 = a free one.", section="Address", least=0, below=65536
    )
    name: str | None = option(
        None, "Name of the model in answers.", section="Address", shown="its folder's or file's"
    )
    chat_template: str | None = option(
        None,
        "Chat template: a file in Jinja, or the name of one of the model's.",
        section="Address",
        metavar="FILE",
    )
    adapter: tuple[str, ...] = option(
        (),
        "Adapter (LoRA) of the model, for requests that name it as their model. May be repeated.",
        section="Address",
        metavar="[NAME=]PATH",
    )
    parallel: int = option(
        16, "Number of sequences decoded together.", section="Sequences", least=1, most=1024
    )
    context: int | None = option(
        None,
        "Tokens of a sequence, prompt included.",
        section="Sequences",
        least=1,
        shown="the model's context, or what half of the free memory holds",
    )
    prefill_chunk: int = option(
        32, "Tokens of a prompt that a step reads.", section="Sequences", least=1, most=4096
    )
    max_waiting: int = option(
        1024, "Requests that may wait; others get status 429.", section="Limits", least=1
    )
    max_n: int = option(16, "Largest number of choices of a prompt.", section="Limits", least=1)
    max_prompts: int = option(
        256, "Largest number of prompts of a request.", section="Limits", least=1
    )
    timeout: float = option(
        30.0,
        "Seconds for a client to send its request, or to read a part of the answer.",
        section="Limits",
        above=0,
    )
    drain_seconds: float = option(
        30.0, "Seconds that running texts have after SIGTERM.", section="Limits", least=0
    )
    api_key_file: str | None = option(
        None, "File with a key a line; a request must have one.", section="Security", metavar="FILE"
    )
    auth: bool = option(
        True, "Refusal to listen on other addresses than loopback without keys.", section="Security"
    )
    cors: tuple[str, ...] = option(
        (),
        "Origin of web pages that may use the server; * = any. May be repeated.",
        section="Security",
        metavar="ORIGIN",
    )
    tls_cert: str | None = option(
        None, "Certificate chain in PEM, for https.", section="Security", metavar="FILE"
    )
    tls_key: str | None = option(
        None, "Private key of the certificate.", section="Security", metavar="FILE"
    )
    log_prompts: bool = option(False, "Prompts and answers in the log.", section="Security")

    def check(self) -> None:
        """Raises UsageError for a value outside its range."""
        check(self)
