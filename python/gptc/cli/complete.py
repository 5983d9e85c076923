"""Shell completion of option values: paths, and the names that an option knows."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import click
from click.shell_completion import CompletionItem

from gptc.errors import GptcError


def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of an option that begin with a word; else paths, if the option takes them."""
    found = [CompletionItem(name) for name in _names(param.name) if name.startswith(incomplete)]
    if param.name in ("preset", "to", "dtype") or (found and incomplete):
        return found
    return [CompletionItem(incomplete, type="file")]


def _names(option: str | None) -> Iterable[str]:
    if option == "data":
        from gptc.data.known import KNOWN_DATASETS

        return KNOWN_DATASETS
    if option == "tokenizer":
        from gptc.tokenizer.registry import KINDS

        return KINDS
    if option == "to":
        from gptc.convert.export_model import DTYPES

        return DTYPES
    if option == "dtype":  # of an export
        from gptc.convert.export_model import DTYPES

        return sorted({dtype for dtypes in DTYPES.values() for dtype in dtypes})
    if option == "tasks":
        from gptc.eval.tasks import OWN

        return (OWN,)
    if option == "preset":
        from gptc.engine.config import presets

        with suppress(GptcError):  # the library is missing: the command itself will say so
            return presets()
    return ()
