"""Opens a file of conversations for a run, with the tokenizer of its model."""

from __future__ import annotations

from dataclasses import replace

from gptc.checkpoint.compatible import check_vocabulary
from gptc.checkpoint.find import tokenizer_name
from gptc.data.chat_cache import resolve_chats
from gptc.data.dataset import Dataset
from gptc.errors import UsageError
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.registry import bpe_size, make_tokenizer
from gptc.training.options import TrainOptions
from gptc.training.progress import Progress


def open_chats(
    options: TrainOptions,
    known: ModelFile | None,
    own: Tokenizer | None,
    show: Progress,
    *,
    resumed: bool = False,
) -> tuple[TrainOptions, Dataset]:
    """The dataset of the file of conversations in `options.data`, with a model's tokenizer.

    A resumed run's tokenizer has the run's chat template, whose file may be gone.
    """
    if own is None:
        name = options.tokenizer or "bytes"
        if name == "char" or bpe_size(name) is not None:
            raise UsageError(
                f"--tokenizer {name} learns from a text, and {options.named_data} has "
                "conversations: give that of a model"
            )
        own = make_tokenizer(tokenizer_name(name))
        options = replace(options, tokenizer=name)
    dataset = resolve_chats(
        options.named_data,
        own,
        chat_template=None if resumed else options.chat_template,
        on_bad_row=options.on_bad_row,
        notify=show.note,
    )
    if known is not None:
        check_vocabulary(known, own, dataset)
    return options, dataset
