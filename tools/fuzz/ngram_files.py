"""Valid small files of counted n-grams, and the functions that read them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np

import mutate
from gptc.eval.ngram import NgramModel
from gptc.eval.ngram_file import COUNTS, NGRAMS, open_ngrams, save_ngrams
from gptc.tokenizer.registry import make_tokenizer
from model_files import Target


def targets(folder: Path) -> dict[str, Target]:
    """Both files of a folder, whose checksum is not compared, so that damage is read."""
    text = b"The cat sat on the mat. The dog saw the cat. " * 3
    model = NgramModel.count(np.frombuffer(text, np.uint8), 256, 4)
    found = {}
    for name, structure in ((NGRAMS, mutate.json_value), (COUNTS, mutate.same_size)):
        path = folder / name.replace(".", "-")
        save_ngrams(path, model, make_tokenizer("bytes"), "text")
        found[name] = Target(path / name, partial(read_ngrams, path), structure)
    return found


def read_ngrams(path: Path) -> None:
    """Opens n-grams, describes them, continues a text and computes losses."""
    file = open_ngrams(path, check_sum=False)
    json.dumps(file.describe())
    history = list(b"The c")
    for _ in range(3):
        history.append(int(np.argmax(file.model.probabilities(history))))
    file.model.losses(list(b"The dog sat."))
