"""tekken.json gives mistral-common's ids, and a damaged one is refused in one line.

mistral-common encodes with tiktoken, and adds the number of special tokens to its ids.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from gptc.errors import GptcError
from gptc.tokenizer.patterns import CUTS
from gptc.tokenizer.registry import make_tokenizer

tiktoken = pytest.importorskip("tiktoken")
PATTERN = CUTS["tekken"].patterns[0]
PIECES = [bytes([i]) for i in range(256)] + [b"th", b" th", b" the", b"He", b"unmerged", b"12"]
N_SPECIAL = 30
TEXTS = ["", "the the HeLLo", " unmerged 1234", "naïve 東京 😀\r\n\n x", "iPhoneX it's"]


def content(**changes: Any) -> dict[str, Any]:
    """A small tekken.json, with more tokens than it uses, as the published ones have."""
    pieces = [*PIECES, b"unused"]
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for i, piece in enumerate(pieces)
    ]
    sizes = {"default_vocab_size": len(PIECES) + N_SPECIAL, "default_num_special_tokens": N_SPECIAL}
    config = {"pattern": PATTERN, "num_vocab_tokens": len(pieces), "version": "v3", **sizes}
    return {"config": {**config, **changes.pop("config", {})}, "vocab": vocab, **changes}


def test_the_ids_are_tiktokens_after_the_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(content()))
    ranks = {piece: i for i, piece in enumerate(PIECES)}
    theirs = tiktoken.Encoding("it", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for path in (tmp_path, tmp_path / "tekken.json"):
        ours = make_tokenizer(str(path))
        assert (ours.vocab_size, ours.bos, ours.named_ends) == (len(PIECES) + N_SPECIAL, 1, (2,))
        for text in TEXTS:
            expected = [N_SPECIAL + id for id in theirs.encode_ordinary(text)]
            assert ours.encode(text).tolist() == expected
            assert ours.decode(expected) == text
    names = ours.special_texts()
    assert (names["[INST]"], names["[TOOL_CONTENT]"], names["<SPECIAL_29>"]) == (3, 19, 29)


def test_special_tokens_that_the_file_lists(tmp_path: Path) -> None:
    listed = [{"rank": i, "token_str": f"<{i}>", "is_control": True} for i in range(2)]
    (tmp_path / "tekken.json").write_text(json.dumps(content(special_tokens=listed)))
    assert make_tokenizer(str(tmp_path)).special_texts()["<1>"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"default_vocab_size": 10}},
        {"config": {"default_vocab_size": 10**9}},
        {"config": {"default_num_special_tokens": 10**9}},
        {"config": {"default_num_special_tokens": -1}},
        {"config": {"default_vocab_size": "many"}},
        {"config": {"default_vocab_size": float("inf")}},
        {"vocab": []},
        {"vocab": [{"rank": 0}] * 262},
        {"vocab": [{"rank": i, "token_bytes": "AA=="} for i in range(262)]},
        {"vocab": 7},
        {"special_tokens": [{"rank": 99, "token_str": "x"}]},
        {"special_tokens": [{"rank": i, "token_str": "x"} for i in range(2)]},
        {"special_tokens": 7},
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(content(**changes)))
    with pytest.raises(GptcError) as caught:
        make_tokenizer(str(tmp_path / "tekken.json"))
    assert "tekken.json" in str(caught.value)
    assert str(caught.value).endswith("copy it again")
