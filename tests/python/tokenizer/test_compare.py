"""Copies of one tokenizer in different files are the same; a tokenizer that does otherwise is not.

The class: a tokenizer that is known by its file, so that the same one by another route is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corpus import write_source
from gptc.checkpoint.compatible import check_vocabulary, prepared_with
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.errors import GptcError, UsageError
from gptc.formats import gguf_tokenizer
from gptc.formats.hf_tokenizer import hf_files
from gptc.generation.drafts import check_draft
from gptc.tokenizer import vocabulary
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.compare import same_tokens
from gptc.tokenizer.native import GPT2_PATTERN
from gptc.tokenizer.patterns import CUTS
from gptc.tokenizer.registry import make_tokenizer
from gptc.tokenizer.scored import Scored, model_proto
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from small_models import make_config, varied
from vocabularies import LLAMA, PIECES, TYPES, byte_level, gpt2_folder, llama_like, needs_gpt2

ROUTES = ("hf", "gguf", "llama2.c")


def spelled(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of the tokenizer.json of a tokenizer."""
    definition: dict[str, Any] = json.loads(hf_files(tokenizer, 48)["tokenizer.json"])
    return definition


def read_back(definition: dict[str, Any]) -> Tokenizer:
    return HuggingFaceTokenizer(json.dumps(definition))


def by_gguf(tokenizer: Tokenizer) -> Tokenizer:
    values = gguf_tokenizer.to_gguf(tokenizer, tokenizer.vocab_size + 5)
    return gguf_tokenizer.from_gguf(values, "it")


def small() -> Tokenizer:
    """Some letters, and pieces of two and three of them."""
    pytest.importorskip("sentencepiece")
    pieces = [*PIECES, "th", "he", "the", "▁the", "at"]
    types = [*TYPES, *[1] * 5]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    return vocabulary.from_scored(Scored(pieces, scores, types), "it")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with that tokenizer in files of each format."""
    folder = tmp_path_factory.mktemp("copies")
    tokenizer = small()
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
        model.save(folder / "own", tokenizer)
    for to in ROUTES:
        export_model(open_checkpoint(folder / "own"), to, folder / to)
    for name in ("gptc_tokenizer.json", "tokenizer.model", "checksums.json"):
        (folder / "hf" / name).unlink()
    return {name: folder / name for name in ("own", *ROUTES)}


def test_sentencepiece_by_other_routes(copies: dict[str, Path]) -> None:
    tokenizers = {name: open_checkpoint(path).tokenizer() for name, path in copies.items()}
    assert len({tokenizer.kind for tokenizer in tokenizers.values()}) == 2
    for one in tokenizers.values():
        for other in tokenizers.values():
            assert same_tokens(one, other)
            assert one.encode(" the  at\n").tolist() == other.encode(" the  at\n").tolist()


@pytest.mark.skipif(not LLAMA.is_file(), reason="no llama2-tokenizer.model")
def test_llama_2_by_other_routes() -> None:
    pytest.importorskip("sentencepiece")
    theirs = make_tokenizer(str(LLAMA))
    for other in (read_back(spelled(theirs)), by_gguf(theirs)):
        assert other.fingerprint() != theirs.fingerprint()
        assert same_tokens(theirs, other)
        assert same_tokens(other, theirs)


def changed_scores(ours: SentencePieceTokenizer) -> Tokenizer:
    pieces, scores, types = ours.scored_pieces()
    scores[-5], scores[-4] = scores[-4], scores[-5]
    return SentencePieceTokenizer(model_proto(Scored(pieces, scores, types)))


def changed_type(ours: SentencePieceTokenizer) -> Tokenizer:
    pieces, scores, types = ours.scored_pieces()
    return SentencePieceTokenizer(model_proto(Scored(pieces, scores, [*types[:-1], 4])))


def changed_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Tokenizer], Tokenizer]:
    def made(ours: Tokenizer) -> Tokenizer:
        definition = spelled(ours)
        change(definition)
        return read_back(definition)

    return made


CUT = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
CHANGES: dict[str, Callable[[Any], Tokenizer]] = {
    "scores": changed_scores,
    "a piece of the user": changed_type,
    "no space": lambda ours: SentencePieceTokenizer(
        model_proto(Scored(*ours.scored_pieces(), add_space=False))
    ),
    "order": changed_json(lambda d: d["model"]["merges"].reverse()),
    "space unless there": changed_json(lambda d: d.update(normalizer=None, pre_tokenizer=CUT)),
    "lower case": changed_json(
        lambda d: d["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    ),
    "dropout": changed_json(lambda d: d["model"].update(dropout=0.5)),
    "spaces in a special token": changed_json(lambda d: d["added_tokens"][1].update(lstrip=True)),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_gives_other_ids_is_another(change: str) -> None:
    ours = small()
    assert not same_tokens(ours, CHANGES[change](ours))
    assert not same_tokens(read_back(spelled(ours)), CHANGES[change](ours))
    assert not same_tokens(ours, llama_like())


def test_normalized_text_is_another() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    import io

    made = []
    for rule in ("identity", "nmt_nfkc"):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat"] * 9),
            model_writer=out,
            model_type="bpe",
            vocab_size=290,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name=rule,
            remove_extra_whitespaces=rule != "identity",
            minloglevel=2,
        )
        made.append(SentencePieceTokenizer(out.getvalue()))
    assert made[0].pieces == made[1].pieces
    assert not same_tokens(made[0], made[1])
    assert same_tokens(made[0], by_gguf(made[0]))


def test_byte_level_by_other_routes(tmp_path: Path) -> None:
    theirs = make_tokenizer(str(byte_level(tmp_path)))
    ours = vocabulary.simplest(theirs, "it")
    assert same_tokens(theirs, by_gguf(theirs))
    learned = make_tokenizer("bpe:300", [b"the cat sat on the mat"])
    copy = read_back(spelled(learned))
    assert (learned.kind, copy.kind) == ("bpe", "huggingface")
    assert same_tokens(learned, copy)
    assert not same_tokens(learned, make_tokenizer("bpe:300", [b"a dog ran, a dog ran"]))
    assert same_tokens(ours, theirs)
    definition = spelled(learned)
    definition["model"]["merges"].reverse()
    assert not same_tokens(learned, read_back(definition))


@needs_gpt2
def test_gpt2_by_other_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_folder()))
    ours = make_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spelled(ours)))
    source = write_source(tmp_path, "Hello world, " * 90)
    dataset = prepare([source], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    assert dataset.tokenizer.kind == "huggingface"
    assert same_tokens(ours, dataset.tokenizer)
    assert prepared_with(dataset, "gpt2") == str(tmp_path / "out")


def test_where_tokenizers_are_compared(copies: dict[str, Path], tmp_path: Path) -> None:
    """Data for training, drafts, --tokenizer, and a dataset that is there already."""
    source = write_source(tmp_path, "the at the\n" * 90)
    prepare([source], tmp_path / "out", tokenizer=str(copies["own"]))
    dataset = Dataset.open(tmp_path / "out")
    for name in ROUTES:
        file = open_checkpoint(copies[name])
        check_vocabulary(file, file.tokenizer(), dataset)
        with varied(make_config("llama", vocab_size=dataset.vocab_size)) as model:
            check_draft(model, dataset.tokenizer, model, file.tokenizer())
    assert prepared_with(dataset, str(copies["hf"])) == str(tmp_path / "out")
    assert prepare([source], tmp_path / "out", tokenizer=str(copies["hf"])).already_there
    (tmp_path / "other").mkdir()
    llama_like().save(tmp_path / "other")
    with pytest.raises(GptcError, match="already holds a dataset"):
        prepare([source], tmp_path / "out", tokenizer=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="was prepared with"):
        prepared_with(dataset, str(tmp_path / "other"))


def changed(tokenizer: Tokenizer, part: str, value: Any) -> Tokenizer:
    return read_back({**spelled(tokenizer), part: value})


def test_rules_that_scores_cannot_express_are_no_scores() -> None:
    """A rare replacement, or merges of some pairs only: a fixed text need not show them."""
    ours = small()
    definition = spelled(ours)
    assert vocabulary.scored(read_back(definition)) is not None
    rare = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    steps = [*definition["normalizer"]["normalizers"], rare]
    replaced = changed(ours, "normalizer", {"type": "Sequence", "normalizers": steps})
    merges = definition["model"]["merges"]
    assert ["t", "he"] in merges
    some = [merge for merge in merges if merge != ["t", "he"]]
    fewer = changed(ours, "model", {**definition["model"], "merges": some})
    # The pairs of one piece apart from each other: no score has a place for both.
    apart = [*some, ["t", "he"]]
    spread = changed(ours, "model", {**definition["model"], "merges": apart})
    split = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    cut = read_back({**definition, "normalizer": None, "pre_tokenizer": split})
    for other in (replaced, fewer, spread):
        assert vocabulary.scored(other) is None
        assert not same_tokens(ours, other)
    assert vocabulary.scored(cut) is not None  # no piece has a space inside


def test_a_pattern_that_is_used_in_another_way_is_another(tmp_path: Path) -> None:
    definition = json.loads(byte_level(tmp_path).read_text())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    patterns = CUTS["llama-bpe"].patterns
    split = {"type": "Split", "pattern": {"Regex": patterns[0]}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, {**level, "use_regex": False}]

    def by(*steps: dict[str, Any]) -> Tokenizer:
        cut = {"type": "Sequence", "pretokenizers": list(steps)}
        return read_back({**definition, "pre_tokenizer": cut})

    known = vocabulary.byte_level(by(*steps))
    assert known is not None
    assert known.cut.patterns == patterns
    for change in ({"behavior": "Removed"}, {"invert": True}):
        assert vocabulary.byte_level(by({**steps[0], **change}, steps[1])) is None
    twice = vocabulary.byte_level(by(steps[0], {**level, "use_regex": True}))
    assert twice is not None
    assert twice.cut.patterns == (*patterns, GPT2_PATTERN)
    assert vocabulary.byte_level(by(steps[0], {"type": "Punctuation"}, steps[1])) is None
