"""A run's loss next to that of counting n-grams in the same data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gptc.checkpoint.compatible import check_vocabulary, tokenizer_argument
from gptc.checkpoint.find import open_folder
from gptc.checkpoint.names import list_checkpoints
from gptc.data.chat_cache import is_chat_file, resolve_chats
from gptc.data.preparation import resolve_dataset
from gptc.errors import GptcError
from gptc.eval.ngram import MOST_TOKENS, count_ngrams, evaluate_ngrams
from gptc.files.words import count
from gptc.training.curves import Curves
from gptc.training.options import TrainOptions

UNASKED_ORDER, UNASKED_TOKENS = 5, 1_000_000  # of a page: 0.23 GB


class Gain(NamedTuple):
    """Bits per byte of the validation split: a run's last ones, and those of n-grams."""

    order: int
    model: float
    counted: float
    n_tokens: int | None = None  # that were counted, if not all of the training split

    def __str__(self) -> str:
        """Such as "21.3% below a 5-gram (1.602 and 2.036 bits per byte)"."""
        share = self.model / self.counted - 1
        side = "below" if share <= 0 else "above"
        part = "" if self.n_tokens is None else f" of the first {count(self.n_tokens)} tokens"
        return (
            f"{abs(share):.1%} {side} a {self.order}-gram{part} ({self.model:.3f} and "
            f"{self.counted:.3f} bits per byte)"
        )


def gain_of(run: Curves, order: int, most: int | None = None) -> Gain:
    """The gain of a run over n-grams of its training split; both losses on its validation split.

    Of each split, n-grams have the first `most` tokens, None = as many as `gptc ngram`.
    The run's loss may be of a part of the split, as its evaluations are. GptcError without such a
    loss, if its data has gone, and for several datasets.
    """
    last, options = run.final(), (run.trainer or {}).get("options")
    if last is None or "val_bpb" not in last:
        raise GptcError(f"{run.folder} has no evaluation in bits per byte")
    if options is None:
        raise GptcError(f"{run.folder} has no checkpoint, which names its data")
    data = options["data"]
    if not isinstance(data, str):
        raise GptcError(f"{run.folder} is of several datasets")
    checkpoint = open_folder(list_checkpoints(Path(run.folder))[-1])
    own = checkpoint.tokenizer()
    if is_chat_file(data):
        dataset = resolve_chats(data, own, on_bad_row=str(options.get("on_bad_row", "stop")))
    else:
        dataset = resolve_dataset(data, tokenizer_argument(own, checkpoint, data))
    check_vocabulary(checkpoint, own, dataset)
    dataset.train_on = options.get("train_on", TrainOptions.train_on)
    model = count_ngrams(dataset, order, most)
    counted = evaluate_ngrams(dataset, order, model=model, most=most or MOST_TOKENS)[-1].bpb
    is_part = most is not None and most < dataset.n_tokens("train")
    return Gain(order, last["val_bpb"], counted, most if is_part else None)
