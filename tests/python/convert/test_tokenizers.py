"""An export has the tokenizer that was given, or none and a note; its ends of a text likewise.

The class: the check after an export compared weights only. So a unigram model went out as byte
pairs, and a tokenizer with more tokens than the model has rows went out whole.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from gptc.checkpoint.find import open_checkpoint
from gptc.convert import export_model as module
from gptc.convert.export_model import DTYPES, ExportReport, export_model
from gptc.convert.import_model import import_model
from gptc.data.stories import stories
from gptc.errors import GptcError
from gptc.formats.registry import open_model
from gptc.tokenizer import vocabulary
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.marks import Marks
from gptc.tokenizer.native import BpeTokenizer, CharTokenizer
from gptc.tokenizer.probe import check_tokens, probe
from gptc.tokenizer.with_sentencepiece import SentencePieceTokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from small_models import make_config, varied
from vocabularies import byte_level, llama_like

FAMILY = {
    "hf": "llama", "gguf": "llama", "llama2.c": "llama", "llm.c": "gpt2", "heimerl": "byte",
    "qgpt": "byte",
}  # fmt: skip


def exported(tmp_path: Path, tokenizer: Tokenizer, to: str, **changes: Any) -> ExportReport:
    """An export of a small model with this tokenizer."""
    heads = {"n_head": 8} if FAMILY[to] == "byte" else {}
    shape = make_config(FAMILY[to], **{"vocab_size": tokenizer.vocab_size, **heads, **changes})
    with varied(shape) as model:
        fits = tokenizer.vocab_size <= shape.vocab_size
        model.save(tmp_path / "source", tokenizer if fits else None)
        tokenizer.save(tmp_path / "source")
    return export_model(open_checkpoint(tmp_path / "source"), to, tmp_path / "out")


def with_added(tmp_path: Path, **flags: Any) -> Tokenizer:
    """A byte-level tokenizer with added words."""
    definition = json.loads(byte_level(tmp_path).read_text())
    added = definition["added_tokens"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i, (name, special) in enumerate({"<|user|>": True, "spouse": False}.items()):
        entry = {"id": 400 + i, "content": name, "special": special, **plain, **flags}
        added.append(entry)
    n = max(definition["model"]["vocab"].values()) + 1
    for i, entry in enumerate(added[1:]):
        entry["id"] = n + i
    return HuggingFaceTokenizer(json.dumps(definition))


def sentencepiece(tmp_path: Path, **options: Any) -> SentencePieceTokenizer:
    """A model that SentencePiece's own trainer makes."""
    spm = pytest.importorskip("sentencepiece")
    text = "\n".join(islice(stories(wide=True), 100))
    (tmp_path / "text.txt").write_text(text)
    values = {"vocab_size": 400, "minloglevel": 2, **options}
    prefix = str(tmp_path / "sp")
    spm.SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=prefix, **values)
    return SentencePieceTokenizer((tmp_path / "sp.model").read_bytes())


@pytest.mark.parametrize("to", DTYPES)
def test_a_tokenizer_that_fits_comes_back(tmp_path: Path, to: str) -> None:
    tokenizer = vocabulary.make_tokenizer("bytes")
    report = exported(tmp_path, tokenizer, to)
    assert "tokenizer" not in " ".join(report.notes)
    heads = {"n_head": 8} if FAMILY[to] == "byte" else {}
    again = import_model(tmp_path / "out", tmp_path / "again", **heads).tokenizer()
    assert again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_added_words_come_back(tmp_path: Path, to: str) -> None:
    tokenizer = with_added(tmp_path)
    assert "tokenizer" not in " ".join(exported(tmp_path, tokenizer, to).notes)
    again = open_checkpoint(tmp_path / "out").tokenizer()
    check_tokens(tokenizer, again, "it")
    if to == "gguf":
        written: Any = open_model(tmp_path / "out")
        key = "tokenizer.ggml.token_type"
        types = written._strings_or_numbers(written.metadata[key], key, True)
        names = {"<|user|>": 3, "spouse": 4, "<|endoftext|>": 3}
        for name, kind in names.items():
            id: Any = tokenizer.id_of(name)  # type: ignore[attr-defined]
            assert types[id] == kind, name


@pytest.mark.parametrize("to", ["gguf", "llama2.c"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, r"not of the sort BPE \(unigram\)"),
        ({"model_type": "bpe", "byte_fallback": True}, "normalizes its text"),
    ],
)
def test_a_sentencepiece_model_of_another_sort_is_left_out(
    tmp_path: Path, to: str, options: dict[str, Any], reason: str
) -> None:
    tokenizer = sentencepiece(tmp_path, vocab_size=600 if options else 400, **options)
    report = exported(tmp_path, tokenizer, to)
    assert any(note.startswith("without a tokenizer: ") for note in report.notes)
    assert pytest.importorskip("re").search(reason, " ".join(report.notes))


@pytest.mark.parametrize("to", ["llm.c", "llama2.c"])
def test_a_file_of_pieces_does_not_hold_added_words(tmp_path: Path, to: str) -> None:
    report = exported(tmp_path, with_added(tmp_path), to)
    assert any(note.startswith("without a tokenizer: read back, it ") for note in report.notes)
    assert report.files == [tmp_path / "out"]
    assert not list(tmp_path.glob("*_tokenizer.bin"))
    assert report.largest_difference == 0


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_flag_that_gguf_lacks_leaves_the_tokenizer_out(tmp_path: Path, flag: str) -> None:
    report = exported(tmp_path, with_added(tmp_path, **{flag: True}), "gguf")
    assert report.notes == ["without a tokenizer: llama.cpp has no tokenizer like huggingface"]
    again = exported(tmp_path / "hf", with_added(tmp_path, **{flag: True}), "hf")
    assert again.notes == []


@pytest.mark.parametrize("to", ["hf", "gguf", "llama2.c", "llm.c"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_left_out(tmp_path: Path, to: str) -> None:
    learned = BpeTokenizer([b"th", b"the"])
    report = exported(tmp_path, learned, to, vocab_size=258)
    assert report.notes[0] == "without a tokenizer: it has 259 tokens, and the model 258"
    assert not list(tmp_path.glob("*_tokenizer.bin"))
    with pytest.raises(GptcError, match="tokenizer"):
        open_checkpoint(tmp_path / "out").tokenizer()
    source = import_model(tmp_path / "source", tmp_path / "imported")
    assert "it has 259 tokens, and the model 258" in " ".join(source.notes)
    assert not (tmp_path / "imported" / "gptc_tokenizer.json").exists()


@pytest.mark.parametrize("to", ["hf", "gguf", "llm.c"])
def test_characters_are_probed_with_what_they_know(tmp_path: Path, to: str) -> None:
    known = CharTokenizer("xyz ")
    assert list(probe(known)) == [" xyz"]
    assert exported(tmp_path, known, to).notes == []
    if to == "hf":
        assert open_checkpoint(tmp_path / "out").tokenizer().kind == "char"


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_chat_templates_survive_an_export(tmp_path: Path, to: str) -> None:
    learned = BpeTokenizer([b"th", b"the"])
    templates = (("rag", "{{ documents }}"), ("tool_use", "{{ tools }}"))
    learned.marks = Marks(ends=(258,), chat_template="{{ x }}", named_templates=templates)
    assert exported(tmp_path, learned, to).notes == []
    again = import_model(tmp_path / "out", tmp_path / "again").tokenizer()
    assert again.marks.templates == learned.marks.templates
    (tmp_path / "again" / "gptc_tokenizer.json").unlink()
    (tmp_path / "again" / "checksums.json").unlink()
    assert open_checkpoint(tmp_path / "again").tokenizer().marks.templates == again.marks.templates


def test_a_place_for_one_end_is_a_note(tmp_path: Path) -> None:
    learned = BpeTokenizer([b"th", b"the"])
    learned.marks = Marks(ends=(258, 7))
    report = exported(tmp_path, learned, "llm.c")
    assert report.notes == ["without the end of text \x07: no place for it"]
    assert (tmp_path / "out_tokenizer.bin").exists()


@pytest.mark.parametrize("to", ["hf", "gguf", "llama2.c", "llm.c"])
def test_a_writer_that_changes_tokens_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """As if the file held another tokenizer than the one that was given."""
    written = module._write_draft
    other = BpeTokenizer([b"th", b"he"])

    def wrong(request: Any, *given: Any) -> Any:
        swapped = request.tokenizer and other
        return written(module.replaced(request, tokenizer=swapped), *given)

    monkeypatch.setattr(module, "_write_draft", wrong)
    report = exported(tmp_path, BpeTokenizer([b"th", b"the"]), to)
    note = next(note for note in report.notes if note.startswith("without a tokenizer: "))
    assert "read back, it would cut 'Hello world, it's the" in note.replace('"', "'")
    assert not list(tmp_path.glob("*_tokenizer.bin"))
    with pytest.raises(GptcError, match="tokenizer"):
        open_checkpoint(tmp_path / "out").tokenizer()


def test_llamas_own_vocabulary_has_its_begin(tmp_path: Path) -> None:
    """ "<s>" is BOS, although no text of this model begins with it."""
    exported(tmp_path, llama_like(), "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    theirs = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    named = (theirs["bos_token"], theirs["eos_token"], theirs["add_bos_token"])
    assert named == ("<s>", "</s>", False)
    ours = json.loads((tmp_path / "out" / "gptc_tokenizer.json").read_text())
    assert ours["start"] == "</s>"  # which the vocabulary has
