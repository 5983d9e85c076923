"""The draft that `--draft` names, for `gptc infer` and `gptc serve`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptc.engine.model import Model
    from gptc.formats.model_file import ModelFile
    from gptc.generation.drafts import DraftPlan
    from gptc.tokenizer.base import Tokenizer


def open_draft(
    stack: ExitStack,
    name: str,
    gpt: Model,
    tokenizer: Tokenizer,
    n_seq: int,
    loading: dict[str, Any],
) -> DraftPlan:
    """The draft for n_seq sequences.

    UsageError for a model with other tokens. `stack` closes it; `loading` are options of
    `load_model`.
    """
    from gptc.generation.drafts import DraftPlan, check_draft

    if name == "ngram":
        return DraftPlan()
    from gptc.checkpoint.facade import load_model, on_newest

    def load(file: ModelFile) -> tuple[Model, Tokenizer]:
        own = file.tokenizer()
        return load_model(file, **loading), own

    small, own = on_newest(name, load)
    stack.enter_context(small)
    check_draft(gpt, tokenizer, small, own)
    return DraftPlan(small, tokenizer, n_seq)
