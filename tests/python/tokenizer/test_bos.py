"""The token that begins a text is read, stored and put before prompts once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.import_model import import_model
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.errors import GptcError
from gptc.formats.hf_tokenizer import hf_files
from gptc.generation.request import make_request, prompt_tokens
from gptc.tokenizer.native import ByteTokenizer
from gptc.tokenizer.registry import make_tokenizer, read_tokenizer
from gptc.tokenizer.with_tokenizers import HuggingFaceTokenizer
from gptc.training.run import train
from small_models import make_config, varied
from vocabularies import PROMPT, begun, byte_level, llama_like, published, template

# ---- the property ----


def test_prompts_begin_with_it_once() -> None:
    tokenizer = llama_like()
    plain = tokenizer.encode(PROMPT).tolist()
    assert prompt_tokens(tokenizer, PROMPT) == plain
    assert prompt_tokens(tokenizer, "") == [2]  # as before: what separates documents
    begun(tokenizer)
    assert prompt_tokens(tokenizer, PROMPT) == [1, *plain]
    assert prompt_tokens(tokenizer, "") == [1]
    assert tokenizer.encode(PROMPT).tolist() == plain
    # SentencePiece reads the name as text, a tokenizer.json as the token.
    assert prompt_tokens(tokenizer, "<s>a") == [1, *tokenizer.encode("<s>a").tolist()]
    files = hf_files(tokenizer, 48)
    theirs = begun(HuggingFaceTokenizer(files["tokenizer.json"].decode()))
    assert prompt_tokens(theirs, "<s>a") == [1, *theirs.encode("<s>a").tolist()[1:]]
    assert prompt_tokens(theirs, "<s>a").count(1) == 1
    assert prompt_tokens(theirs, "a").count(1) == 1


def test_tokens_are_taken_as_they_are() -> None:
    tokenizer = begun(llama_like())
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
        assert make_request(model, tokenizer, [5, 6]).prompt == [5, 6]
        assert make_request(model, tokenizer, []).prompt == [1]


def test_a_prompt_of_no_tokens_is_none() -> None:
    """A tokenizer may drop all of a text; a document begins then."""
    definition = json.loads(hf_files(llama_like(), 48)["tokenizer.json"])
    definition["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    tokenizer = HuggingFaceTokenizer(json.dumps(definition))
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
        assert make_request(model, tokenizer, " ").prompt == [2]
        assert make_request(model, begun(tokenizer), " ").prompt == [1]


def test_it_is_stored_beside_the_mapping(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    fingerprint = "1b5ec18e75637aa79a17040f88dbca7b2350d25f5eb340eb20c5ac2015d04072"
    before = {"version": 1, "vocab_size": 256, "start": "\n", "end_of_text": None, "kind": "bytes"}
    before["fingerprint"] = fingerprint
    assert tokenizer.to_json() == before  # as it was before there was such a property
    begun(tokenizer, 7).save(tmp_path)
    again = read_tokenizer(tmp_path)
    assert (again.bos, again.fingerprint()) == (7, fingerprint)
    assert again.twin().bos == 7
    saved = json.loads((tmp_path / "gptc_tokenizer.json").read_text())
    assert saved == {**before, "version": 2, "bos": 7}
    for wrong in (256, -1, "7", 7.0, True, None, [7]):
        (tmp_path / "gptc_tokenizer.json").write_text(json.dumps({**saved, "bos": wrong}))
        with pytest.raises(GptcError, match="altered"):
            read_tokenizer(tmp_path)
    (tmp_path / "gptc_tokenizer.json").write_text(json.dumps(before))
    assert read_tokenizer(tmp_path).bos is None


# ---- Hugging Face's files ----


_NONE: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("processor", "config", "bos"),
    [
        (template("<s>", 1), _NONE, 1),
        (template("<s>", 1), {"tokenizer_class": "PreTrainedTokenizerFast"}, 1),
        (template("<s>", 1), {"tokenizer_class": "LlamaTokenizerFast"}, 1),
        (
            template("<s>", 1),
            {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
            None,
        ),
        (template("<s>", 1, added=False), {"tokenizer_class": "LlamaTokenizer"}, None),
        (
            template("<s>", 1, added=False),
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
            1,
        ),
        (template("<s>", 10**6), _NONE, None),
        (None, _NONE, None),
        (None, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}, None),
        (None, {"tokenizer_class": "LlamaTokenizer"}, 1),
        (None, {"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "</s>"}}, 2),
        (None, {"tokenizer_class": "LlamaTokenizer", "bos_token": None}, None),
        (None, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<nobody>"}, None),
        (
            {"type": "Sequence", "processors": [template("<s>", 1)]},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
            1,
        ),
    ],
)
def test_a_tokenizer_json(tmp_path: Path, processor: Any, config: Any, bos: int | None) -> None:
    definition = json.loads(hf_files(llama_like(), 48)["tokenizer.json"])
    definition["post_processor"] = processor
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert make_tokenizer(str(tmp_path)).bos == bos
    assert make_tokenizer(str(tmp_path / "tokenizer.json")).bos == bos


def test_a_model_file_alone_is_llamas(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(hf_files(llama_like(), 48)["tokenizer.model"])
    assert make_tokenizer(str(tmp_path)).bos == 1
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert make_tokenizer(str(tmp_path)).bos is None
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(GptcError, match=r"tokenizer_config\.json is damaged"):
        make_tokenizer(str(tmp_path))


def test_gpt2s_sort_has_none(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = make_tokenizer(str(tmp_path))
    assert tokenizer.bos is None
    assert prompt_tokens(tokenizer, "") == [tokenizer.end_of_text]
    assert prompt_tokens(tokenizer, "the") == tokenizer.encode("the").tolist()


def test_it_stays_where_a_tokenizer_becomes_one_of_ours(tmp_path: Path) -> None:
    learned = make_tokenizer("bpe:300", [PROMPT.encode() * 20])
    with Model.create(make_config("gpt2", vocab_size=learned.vocab_size), threads=1) as model:
        model.save(tmp_path / "m", begun(learned, learned.end_of_text))
    for name in ("checksums.json", "gptc_tokenizer.json"):
        (tmp_path / "m" / name).unlink()
    again = Checkpoint(tmp_path / "m").tokenizer()
    assert (again.kind, again.bos) == ("bpe", learned.end_of_text)


def test_a_checkpoint_in_hugging_faces_terms(tmp_path: Path) -> None:
    for bos, tokenizer in ((1, begun(llama_like())), (None, llama_like())):
        folder = tmp_path / str(bos)
        with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
            model.save(folder, tokenizer)
        config = json.loads((folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
        theirs = json.loads((folder / "tokenizer_config.json").read_text())
        assert theirs["add_bos_token"] == (bos is not None)
        assert theirs["bos_token"] == "<s>"
        for name in ("checksums.json", "gptc_tokenizer.json"):
            (folder / name).unlink()
        assert Checkpoint(folder).tokenizer().bos == bos


def test_a_template_is_taken_out_where_a_model_was_not_taught_so(tmp_path: Path) -> None:
    """The tokenizer comes from another model, whose file adds a token."""
    theirs = make_tokenizer(str(published(tmp_path / "theirs", llama_like())))
    assert theirs.bos == 1
    definition = theirs.mapping()["definition"]
    assert hf_files(theirs, 48)["tokenizer.json"].decode() == definition
    written = hf_files(begun(make_tokenizer(str(tmp_path / "theirs")), None), 48)
    again = HuggingFaceTokenizer(written["tokenizer.json"].decode())
    assert again.own_bos() is None
    assert again.encode(PROMPT).tolist() == theirs.encode(PROMPT).tolist()


# ---- data and training ----


def test_it_is_the_models_and_not_the_datas(
    tmp_path: Path, text_file: Path, options: dict[str, Any]
) -> None:
    theirs = published(tmp_path / "theirs", llama_like())
    import_model(theirs, tmp_path / "imported")
    for i, folder in enumerate((theirs, tmp_path / "imported")):
        prepare([str(text_file)], tmp_path / f"data{i}", tokenizer=str(folder))
        dataset = Dataset.open(tmp_path / f"data{i}")
        assert dataset.tokenizer.bos is None
        assert dataset.shard("train", 0)[0] != 1
    options |= {"data": str(tmp_path / "data0"), "seq_len": 16, "preset": "llama-15m"}
    fresh = train({**options, "out": str(tmp_path / "fresh"), "steps": 1})
    assert open_checkpoint(fresh.out).tokenizer().bos is None
    shape = ("preset", "n_layer", "n_head", "n_embd", "n_ff")
    rest = {name: value for name, value in options.items() if name not in shape}
    for i, folder in enumerate((theirs, tmp_path / "imported")):
        tuned = train(
            {**rest, "init_from": str(folder), "out": str(tmp_path / f"tuned{i}"), "steps": 1}
        )
        assert open_checkpoint(tuned.out).tokenizer().bos == 1
    train({"steps": 2}, resume=tuned.out)
    assert open_checkpoint(tuned.out).tokenizer().bos == 1
    train({"steps": 2}, resume=fresh.out)
    assert open_checkpoint(fresh.out).tokenizer().bos is None
