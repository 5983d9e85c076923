"""The data of a run: its dataset, prepared with the right tokenizer, and its loader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gptc.checkpoint.compatible import (
    check_vocabulary,
    is_kind,
    own_tokenizer,
    prepared_with,
    same_tokenizer,
    tokenizer_argument,
    trained_packing,
)
from gptc.checkpoint.find import open_checkpoint, tokenizer_name
from gptc.checkpoint.reader import Checkpoint
from gptc.data.chat_cache import is_chat_file
from gptc.data.chat_loader import make_loader
from gptc.data.dataset import Dataset
from gptc.data.loader import Loader
from gptc.data.mixture import MixedLoader, Mixture, not_mixed
from gptc.data.options import PACKING, TEXT_PACKING, Packing
from gptc.data.pairs import PairLoader
from gptc.data.preparation import resolve_dataset
from gptc.errors import UsageError
from gptc.formats.model_file import ModelFile, merge_first
from gptc.training.chats import open_chats
from gptc.training.defaults import default_tokenizer
from gptc.training.options import TrainOptions
from gptc.training.progress import Progress


def initial_model(options: TrainOptions, base: Checkpoint | None) -> ModelFile | None:
    """The model to fine-tune."""
    if base is not None or options.init_from is None:
        return None
    initial = open_checkpoint(options.init_from)
    if initial.lora is not None:
        raise UsageError(
            f"{options.init_from} holds adapters: continue their run with --resume, or "
            f"{merge_first(options.init_from)}"
        )
    return initial


def open_loader(options: TrainOptions, dataset: Dataset) -> Loader:
    """The loader of the training split."""
    sizes, n_ahead = (options.batch_size, options.seq_len, options.seed), options.grad_accum
    if options.dpo:
        return PairLoader(dataset, "train", *sizes, n_ahead=n_ahead)
    if isinstance(dataset, Mixture):
        return MixedLoader(dataset, "train", *sizes, n_ahead=n_ahead)
    packing: Packing = "fit" if options.packing == "fit" else "pad"
    return make_loader(dataset, "train", *sizes, n_ahead=n_ahead, packing=packing)


def settle_packing(
    options: TrainOptions, dataset: Dataset, initial: ModelFile | None, resumed: bool
) -> TrainOptions:
    """Gives the options the packing that suits the data, and the data theirs.

    Documents stay apart, unless a packing is given, if the model to fine-tune was trained so.
    UsageError for one of the other sort of data. Older runs have recorded one for any, and for
    texts that nothing was given for, pad.
    """
    kinds = PACKING if dataset.is_chats else TEXT_PACKING
    packing = options.packing
    if packing not in kinds:
        if packing not in ("auto", "pad") and not resumed:
            sort, other = ("conversations", "texts")[:: 1 if dataset.is_chats else -1]
            raise UsageError(
                f"--packing {packing} is for {other}, and {options.named_data} has {sort}: use "
                f"{' or '.join(kinds)}"
            )
        inherited = trained_packing(initial) if packing == "auto" and initial else None
        apart = inherited == "documents" and not dataset.is_chats
        packing = "documents" if apart else kinds[0]
    if packing == "documents":
        dataset.keep_apart()
    return replace(options, packing=packing)


def open_dataset(
    options: TrainOptions, base: Checkpoint | None, initial: ModelFile | None, show: Progress
) -> tuple[TrainOptions, Dataset]:
    """The dataset, prepared with the tokenizer of the resumed or fine-tuned model, if any.

    Also returns the options with that tokenizer.
    """
    known, name = base or initial, options.tokenizer
    own = own_tokenizer(known) if known is not None else None
    names = [one.name for one in options.mixture] or [options.named_data]
    for one in options.mixture:
        if is_chat_file(one.name):
            raise not_mixed(one.name)
    if is_chat_file(options.named_data):
        return open_chats(options, known, own, show, resumed=base is not None)
    own_name = None
    if own and known and (name is None or base is not None):
        own_name = tokenizer_argument(own, known, names[0])
    if name is None:
        name = own_name or default_tokenizer(options)
    elif base is not None and not is_kind(name):
        # The tokenizer's original folder may be gone; the checkpoint has a copy.
        name = own_name or name
    name = tokenizer_name(name)
    noted: set[str] = set()

    def report(action: str, n_done: int, n_bytes: int | None) -> None:
        if action not in noted:
            noted.add(action)
            show.note(f"preparing {options.named_data}: {action}")

    def resolved(tokenizer: str) -> Dataset:
        found = [
            resolve_dataset(one, tokenizer, progress=report, notify=show.note) for one in names
        ]
        return Mixture(options.mixture, found) if options.mixture else found[0]

    dataset = resolved(name)
    if base is not None and own and own_name and not same_tokenizer(own, dataset):
        # The text has changed, so a tokenizer learned from it has changed too.
        dataset = resolved(own_name)
    if base is None:
        if str(dataset.folder) in names:
            name = prepared_with(dataset, options.tokenizer)
        options = replace(options, tokenizer=name if is_kind(name) else str(Path(name).resolve()))
    if known is not None:
        check_vocabulary(known, own, dataset)
    if own is not None:
        dataset.adopt(own)  # as in the model's earlier training
    return options, dataset
