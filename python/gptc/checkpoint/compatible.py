"""Whether a dataset's tokenizer and a model's vocabulary go together."""

from __future__ import annotations

from pathlib import Path

from gptc.checkpoint.find import keep_tokenizer, tokenizer_name
from gptc.checkpoint.reader import Checkpoint
from gptc.data.dataset import Dataset
from gptc.data.description import DATASET_FILE
from gptc.data.preparation import check_exists
from gptc.errors import GptcError, NoTokenizer, UnknownTokenizer, UsageError
from gptc.files.words import quoted
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.compare import same_tokens
from gptc.tokenizer.native import ByteTokenizer, Gpt2Tokenizer
from gptc.tokenizer.registry import KINDS, bpe_size, is_spec, make_tokenizer


def own_tokenizer(known: ModelFile) -> Tokenizer | None:
    """The tokenizer that a model was trained with; None where it has none that gptc reads.

    GptcError for a damaged one.
    """
    try:
        return known.tokenizer()
    except (NoTokenizer, UnknownTokenizer):
        return None


def trained_packing(known: ModelFile) -> str | None:
    """The --packing of a checkpoint's run; None = not known."""
    trainer = known.trainer() if isinstance(known, Checkpoint) else None
    packing = (trainer or {}).get("options", {}).get("packing")
    return None if packing is None else str(packing)


def tokenizer_argument(own: Tokenizer, known: ModelFile, data: str) -> str:
    """The `--tokenizer` argument that prepares `data` with a model's own tokenizer.

    A folder that is a dataset already keeps its tokenizer; check_vocabulary compares that.
    """
    if own.kind in ("bytes", "gpt2"):
        return own.kind
    if not known.path.is_file():
        return str(known.path)
    if (Path(data) / DATASET_FILE).is_file():
        return data
    check_exists(data)
    return str(keep_tokenizer(own))


def is_kind(name: str) -> bool:
    """Whether a tokenizer is named by its kind, such as bpe:2048, and not by its path."""
    return name.partition(":")[0] in KINDS


def prepared_with(dataset: Dataset, given: str | None) -> str:
    """The name of a prepared dataset's tokenizer. UsageError when `given` is another one."""
    theirs = dataset.tokenizer
    spec = str(dataset.meta["options"].get("tokenizer"))
    own = spec if is_spec(spec) else str(dataset.folder)
    if given is None or given == own:
        return own
    if is_spec(given):
        size = bpe_size(given)
        same = (
            theirs.kind == given or _is_same_as(given, theirs)
            if size is None
            else (theirs.kind, size) == ("bpe", theirs.vocab_size)
        )
    else:
        same = same_tokens(make_tokenizer(tokenizer_name(given)), theirs)
    if not same:
        raise UsageError(
            f"{dataset.named} was prepared with {spec if is_spec(spec) else theirs.kind}: leave "
            f"--tokenizer {quoted(given)} out, or prepare the text again with: "
            f"gptc prepare SOURCE --tokenizer {quoted(given)} --out DIR"
        )
    return own


def _is_same_as(kind: str, theirs: Tokenizer) -> bool:
    """Whether a tokenizer is that of a kind which is stored in another way."""
    known = {t.kind: t for t in (ByteTokenizer(), Gpt2Tokenizer())}.get(kind)
    return known is not None and same_tokens(known, theirs)


def same_tokenizer(own: Tokenizer, dataset: Dataset) -> bool:
    return same_tokens(own, dataset.tokenizer)


def check_vocabulary(known: ModelFile, own: Tokenizer | None, dataset: Dataset) -> None:
    """GptcError unless a dataset has the model's tokenizer, and tokens within its vocabulary."""
    theirs = dataset.tokenizer
    if own is not None and not same_tokenizer(own, dataset):
        name = own.kind if own.kind in ("bytes", "gpt2") else str(known.path)
        raise GptcError(
            f"{known.path} was made with the {own.kind} tokenizer ({own.vocab_size:,} tokens), "
            f"{dataset.named} with {theirs.kind} ({theirs.vocab_size:,}); prepare the text again "
            f"with: gptc prepare SOURCE --out DIR --tokenizer {quoted(name)}"
        )
    if dataset.vocab_size > known.config.vocab_size:
        raise GptcError(
            f"{dataset.named} has a vocabulary of {dataset.vocab_size:,} ({theirs.kind} "
            f"tokenizer), {known.path} one of {known.config.vocab_size:,}; prepare the text with "
            "the model's tokenizer"
        )
