"""What a text begins with: read from every format, kept, put before prompts once, written again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_infer import Script
from test_pretrained import LLAMA, byte_level

from conftest import make_config, varied
from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.data import prepare
from gptc.data.dataset import Dataset
from gptc.errors import GptcError
from gptc.formats import gguf_tokenizer
from gptc.formats.hf_tokenizer import hf_files
from gptc.formats.registry import open_model
from gptc.generation.beam import beam_search
from gptc.generation.decoder import Generation, generate
from gptc.generation.drafts import ModelDraft, NgramDraft
from gptc.generation.request import make_request, prompt_tokens
from gptc.generation.sampling import Sampling
from gptc.tokenizer import scored, vocabulary
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.byte_level import PATTERNS
from gptc.tokenizer.native import ByteTokenizer
from gptc.tokenizer.pretrained import HuggingFaceTokenizer, TiktokenTokenizer
from gptc.tokenizer.registry import make_tokenizer, read_tokenizer
from gptc.training.run import train

Gptc = Callable[..., Any]

PROMPT = "the cat sat"
# As in Llama 2: what is unknown, where texts begin and end, the bytes; then some letters.
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghilmnorstuw"]
TYPES = [scored.UNKNOWN, scored.CONTROL, scored.CONTROL]
TYPES += [scored.BYTE] * 256 + [scored.NORMAL] * (len(PIECES) - 259)


def llama_like() -> Tokenizer:
    """A small SentencePiece model of Llama 2's sort, as it comes out of one: without a say."""
    pytest.importorskip("sentencepiece")
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)]
    return vocabulary.from_scored(scored.Scored(PIECES, scores, TYPES), "it")


def begun(tokenizer: Tokenizer, bos: int | None = 1) -> Tokenizer:
    tokenizer.bos = bos
    return tokenizer


def template(name: str, token: int, added: bool = True) -> dict[str, Any]:
    """As transformers writes it: also where nothing is added."""
    begin = [{"SpecialToken": {"id": name, "type_id": 0}}] if added else []
    return {
        "type": "TemplateProcessing",
        "single": [*begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB")],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def published(folder: Path, tokenizer: Tokenizer, seed: int = 3) -> Path:
    """A small Llama as others publish theirs: a template in tokenizer.json, no file of ours."""
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size), seed=seed) as model:
        model.save(folder, begun(tokenizer, None))
    for name in ("gptc_tokenizer.json", "checksums.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").unlink(missing_ok=True)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["post_processor"] = template("<s>", 1)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


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
    """SentencePiece's own space before a text is all that is left of this one."""
    tokenizer = llama_like()
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
        assert (config["bos_token_id"], config["eos_token_id"]) == (bos or 2, 2)
        theirs = json.loads((folder / "tokenizer_config.json").read_text())
        assert theirs["add_bos_token"] == (bos is not None)
        assert theirs["bos_token"] == ("<s>" if bos else "</s>")
        for name in ("checksums.json", "gptc_tokenizer.json"):
            (folder / name).unlink()
        assert Checkpoint(folder).tokenizer().bos == bos


def test_a_template_is_taken_out_where_a_model_was_not_taught_so(tmp_path: Path) -> None:
    """With the tokenizer of another, whose file adds a token."""
    theirs = make_tokenizer(str(published(tmp_path / "theirs", llama_like())))
    assert theirs.bos == 1
    definition = theirs.mapping()["definition"]
    assert hf_files(theirs, 48)["tokenizer.json"].decode() == definition
    written = hf_files(begun(make_tokenizer(str(tmp_path / "theirs")), None), 48)
    again = HuggingFaceTokenizer(written["tokenizer.json"].decode())
    assert again.own_bos() is None
    assert again.encode(PROMPT).tolist() == theirs.encode(PROMPT).tolist()


# ---- GGUF, llama2.c ----


@pytest.mark.parametrize("bos", [None, 1])
def test_gguf_says_the_same(tmp_path: Path, bos: int | None) -> None:
    tokenizer = begun(llama_like(), bos)
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
        model.save(tmp_path / "source", tokenizer)
    export_model(open_checkpoint(tmp_path / "source"), "gguf", tmp_path / "m.gguf")
    source: Any = open_model(tmp_path / "m.gguf")
    assert source.metadata["tokenizer.ggml.add_bos_token"] is (bos is not None)
    assert source.metadata["tokenizer.ggml.bos_token_id"] == 1
    assert source.tokenizer().bos == bos
    import_model(tmp_path / "m.gguf", tmp_path / "back")
    assert open_checkpoint(tmp_path / "back").tokenizer().bos == bos


def test_gguf_where_nothing_is_said() -> None:
    """llama.cpp: SentencePiece's sort begins with token 1, Llama 3's with its own, no other."""
    values = gguf_tokenizer.to_gguf(llama_like(), len(PIECES))
    assert gguf_tokenizer.from_gguf(values, "it").bos is None
    for key in ("add_bos_token", "bos_token_id"):
        del values[key]
    assert gguf_tokenizer.from_gguf(dict(values), "it").bos == 1
    assert gguf_tokenizer.from_gguf({**values, "bos_token_id": 2}, "it").bos == 2
    for wrong in (10**6, -1, "1", [1]):
        assert gguf_tokenizer.from_gguf({**values, "bos_token_id": wrong}, "it").bos is None
    special = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257}
    ranked = [bytes([i]) for i in range(256)]
    for pre, bos in (("llama-bpe", 256), ("gpt-2", None), ("smollm", None)):
        pattern = PATTERNS[pre]
        values = gguf_tokenizer.to_gguf(
            begun(TiktokenTokenizer("it", pattern, ranked, special), 256), 258
        )
        assert (values["add_bos_token"], values["bos_token_id"]) == (True, 256)
        assert gguf_tokenizer.from_gguf(dict(values), "it").bos == 256
        del values["add_bos_token"]
        assert gguf_tokenizer.from_gguf(values, "it").bos == bos


def test_llama2c_always_begins_with_token_1(tmp_path: Path) -> None:
    tokenizer = begun(llama_like())
    with varied(make_config("llama", vocab_size=tokenizer.vocab_size)) as model:
        model.save(tmp_path / "taught", tokenizer)
        model.save(tmp_path / "not", begun(tokenizer, None))
        model.save(tmp_path / "bytes", ByteTokenizer())
    notes = {}
    for name in ("taught", "not", "bytes"):
        source = open_checkpoint(tmp_path / name)
        report = export_model(source, "llama2.c", tmp_path / f"{name}.bin")
        notes[name] = " ".join(report.notes)
    assert notes["taught"] == ""
    assert "begin every text with token 1" in notes["not"]
    assert "begin every text with token 1" in notes["bytes"]
    assert open_model(tmp_path / "taught.bin").tokenizer().bos == 1
    assert open_model(tmp_path / "bytes.bin").tokenizer().bos is None
    # The tokenizer's file is the same, and these programs know no other beginning.
    assert (tmp_path / "taught_tokenizer.bin").read_bytes() == (
        tmp_path / "not_tokenizer.bin"
    ).read_bytes()


def test_a_file_of_llama2cs_own_begins_with_token_1(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    with varied(make_config("llama", vocab_size=260)) as model:
        model.save(tmp_path / "source", None)
    export_model(open_checkpoint(tmp_path / "source"), "llama2.c", tmp_path / "stories.bin")
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{i:02X}>".encode() for i in range(256))]
    rows = [struct.pack("<fi", -float(i), len(p)) + p for i, p in enumerate([*pieces, b" "])]
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 7) + b"".join(rows))
    import_model(tmp_path / "stories.bin", tmp_path / "stories")
    for path in (tmp_path / "stories.bin", tmp_path / "stories"):
        assert open_checkpoint(path).tokenizer().bos == 1


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


# ---- decoding ----


@pytest.fixture
def taught(tmp_path: Path) -> Path:
    return published(tmp_path / "taught", llama_like())


def test_every_way_of_infer_begins_so(gptc: Gptc, taught: Path, tmp_path: Path) -> None:
    source = open_checkpoint(taught)
    tokenizer = source.tokenizer()
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "stop": ()}
    with load_model(source, dtype="fp32") as model:
        ids = [1, *tokenizer.encode(PROMPT).tolist()]
        expected = Generation(
            model, tokenizer, ids, sampling=Sampling(temperature=0), max_tokens=12
        )
        text = "".join(piece for _, piece in expected)
        raw = tokenizer.encode(PROMPT).tolist()
        without = Generation(model, tokenizer, raw, sampling=Sampling(temperature=0), max_tokens=12)
        assert "".join(piece for _, piece in without) != text  # else this would show nothing
        assert generate(model, tokenizer, PROMPT, **options) == [text]
        for draft in (NgramDraft(), ModelDraft(model, tokenizer)):
            assert generate(model, tokenizer, PROMPT, draft=draft, **options) == [text]
        nothing = generate(model, tokenizer, "", **options)
        beams = {
            given: beam_search(model, tokenizer, make_request(model, tokenizer, given), 3)[0][
                0
            ].text
            for given in ("", PROMPT)
        }
    command = ("infer", "-m", taught, "--dtype", "fp32", "--temperature", 0, "--max-tokens", 12)
    assert gptc(*command, "-p", PROMPT).out == f"{PROMPT}{text}\n"
    assert gptc(*command, "-p", "").out == f"{nothing[0]}\n"
    assert gptc(*command, "-p", PROMPT, "--draft", "ngram").out == f"{PROMPT}{text}\n"
    answer = json.loads(gptc(*command, "-p", PROMPT, "--json").out)
    assert answer["prompt_tokens"] == len(ids)
    assert answer["samples"][0]["text"] == text
    (tmp_path / "prompts").write_text(json.dumps({"prompt": PROMPT}) + '\n{"prompt": ""}\n')
    lines = gptc(*command, "--prompts", tmp_path / "prompts").out.splitlines()
    assert [json.loads(line)["samples"][0]["text"] for line in lines] == [text, nothing[0]]
    command = ("infer", "-m", taught, "--dtype", "fp32", "--beams", 3)
    assert gptc(*command, "-p", PROMPT).out == f"{PROMPT}{beams[PROMPT]}\n"
    assert gptc(*command, "-p", "").out == f"{beams['']}\n"


def test_a_conversation_goes_on_without_a_second_one(taught: Path) -> None:
    from gptc.cli.infer import _Writer

    source = open_checkpoint(taught)
    tokenizer = source.tokenizer()
    settings = {"sampling": Sampling(temperature=0), "max_tokens": 4, "num_samples": 1, "stop": ()}
    with load_model(source, dtype="fp32") as model:
        writer = _Writer(model, tokenizer, source, settings, None)
        writer.answer(PROMPT)
        writer.answer("")
        assert writer._last is not None
        sequence = writer._last.sequence
        whole = Generation(
            model, tokenizer, PROMPT, sampling=Sampling(temperature=0), max_tokens=8, stop=()
        )
        for _ in whole:
            pass
    assert sequence == whole.samples[0].sequence
    assert sequence.count(1) == 1


def test_where_another_text_begins_this_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama2.c's run does: its models see no other end."""
    tokenizer = begun(ByteTokenizer(), 1)
    with varied(make_config("byte")) as model:
        Script(monkeypatch, b"yes\x01no", 2)  # after the prompt: it and "a"
        generation = Generation(model, tokenizer, "a", max_tokens=20)
        assert "".join(piece for _, piece in generation) == "yes"
        assert generation.samples[0].finish == "stop"
        begun(tokenizer, None)
        Script(monkeypatch, b"yes\x01no", 1)
        assert generate(model, tokenizer, "a", max_tokens=6, stop=()) == ["yes\x01no"]


def test_a_beam_ends_there_too() -> None:
    """As it does at the end-of-text token."""
    tokenizer = ByteTokenizer()
    with varied(make_config("byte")) as model:
        request = make_request(model, tokenizer, [1, 97], max_tokens=8, stop=(), num_samples=3)
        ((sample, _), *_) = beam_search(model, tokenizer, request, 3, 0.0)
        # Whatever was likeliest at the third place now ends texts.
        tokenizer.end_of_text = sample.tokens[2]  # type: ignore[assignment]
        expected = beam_search(model, tokenizer, request, 3, 0.0)
        tokenizer.end_of_text, tokenizer.bos = None, sample.tokens[2]
        found = beam_search(model, tokenizer, request, 3, 0.0)
    assert "stop" in {sample.finish for sample, _ in expected}
    assert [(s.tokens, s.finish, score) for s, score in found] == [
        (s.tokens, s.finish, score) for s, score in expected
    ]


@pytest.mark.parametrize(("n_ctx", "draft"), [(48, False), (48, True), (5, False), (3, False)])
def test_a_context_that_shifts_keeps_it_first(n_ctx: int, draft: bool) -> None:
    """In the place of the half's oldest token, unless that is all there is room for."""
    tokenizer = begun(llama_like())
    n = 110
    config = make_config("llama", vocab_size=tokenizer.vocab_size, block_size=n_ctx)
    with varied(config) as model:
        ban = Sampling(temperature=0, bias=((1, float("-inf")), (2, float("-inf"))))
        generation = Generation(
            model, tokenizer, PROMPT, sampling=ban, max_tokens=n, stop=(), context_shift=True,
            draft=NgramDraft() if draft else None,
        )  # fmt: skip
        for _ in generation:
            pass
        found = generation.samples[0].sequence
        held = expected = prompt_tokens(tokenizer, PROMPT)
        for _ in range(n):
            if len(held) > n_ctx:
                held = held[-(n_ctx // 2) :]
                held = [1, *held[1:]] if len(held) > 1 else held
            logits = model.logits(np.array([held], np.int32))[0, -1].copy()
            logits[[1, 2]] = -np.inf
            token = int(np.argmax(logits))
            held, expected = [*held, token], [*expected, token]
    assert found == expected


def test_info_says_so(gptc: Gptc, taught: Path) -> None:
    assert "<s> before a text" in gptc("info", taught).out


# ---- transformers ----

needs_transformers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="needs transformers",
)
PROMPTS = ["the cat sat", "Once upon a time, there was", "naïve 東京 😀\n\nx", "a", ""]


def by_transformers(folder: Path, prompt: str, n: int) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and those that are likeliest to follow, one by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = tokenizer(prompt, return_tensors="pt")
    ids = given.input_ids[0].long().tolist()
    if not ids:
        return ids, []
    out = model.generate(
        input_ids=given.input_ids, attention_mask=given.attention_mask,
        do_sample=False, max_new_tokens=n, pad_token_id=0,
    )[0].tolist()  # fmt: skip
    return ids, out[len(ids) :]


@pytest.mark.parity
@needs_transformers
@pytest.mark.parametrize("kind", ["small", "llama 2"])
@pytest.mark.parametrize("sort", ["published", "imported", "gguf", "trained"])
def test_the_ids_and_the_greedy_text_are_transformers(
    tmp_path: Path, kind: str, sort: str, gptc: Gptc
) -> None:
    if kind == "llama 2" and not LLAMA.is_file():
        pytest.skip("no llama2-tokenizer.model")
    pytest.importorskip("sentencepiece")
    tokenizer = llama_like() if kind == "small" else make_tokenizer(str(LLAMA))
    folder = published(tmp_path / "published", tokenizer)
    if sort in ("imported", "gguf"):
        import_model(folder, tmp_path / "imported")
        folder = tmp_path / "imported"
    if sort == "gguf":
        export_model(open_checkpoint(folder), "gguf", tmp_path / "m.gguf")
        import_model(tmp_path / "m.gguf", tmp_path / "again")
        folder = tmp_path / "again"
    if sort == "trained":
        with load_model(open_checkpoint(folder), dtype="fp32") as model:
            model.save(tmp_path / "trained", begun(tokenizer, None))
        folder = tmp_path / "trained"
    ours = open_checkpoint(folder).tokenizer()
    n_begun = 0
    for prompt in PROMPTS:
        ids, written = by_transformers(folder, prompt, 16)
        if not ids:
            continue
        n_begun += ids[0] == 1
        assert ids == prompt_tokens(ours, prompt)
        ran = gptc(
            "infer", "-m", folder, "-p", prompt, "--temperature", 0, "--max-tokens", 16,
            "--dtype", "fp32", "--json",
        )  # fmt: skip
        end = next((i for i, token in enumerate(written) if token in (1, 2)), len(written))
        assert json.loads(ran.out)["samples"][0]["text"] == ours.decode(written[:end])
    assert n_begun == (0 if sort == "trained" else len(PROMPTS))


@pytest.mark.parity
@needs_transformers
def test_llama_3s_sort(tmp_path: Path) -> None:
    """Byte-level, with a token of its own at the beginning, behind another processor."""
    from transformers import AutoTokenizer

    folder = tmp_path / "llama3"
    shutil.copytree(byte_level(tmp_path).parent, folder, dirs_exist_ok=True)
    definition = json.loads((folder / "tokenizer.json").read_text())
    token = len(definition["model"]["vocab"])
    entry = {**definition["added_tokens"][0], "id": token, "content": "<|begin_of_text|>"}
    definition["added_tokens"].append(entry)
    level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    begin = template("<|begin_of_text|>", token)
    definition["post_processor"] = {"type": "Sequence", "processors": [level, begin]}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = make_tokenizer(str(folder))
    assert tokenizer.bos == token
    with Model.create(make_config("llama", vocab_size=token + 1), threads=1) as model:
        model.save(tmp_path / "model", tokenizer)
    for path in (folder, tmp_path / "model"):
        theirs = AutoTokenizer.from_pretrained(path)
        assert theirs(PROMPT).input_ids == prompt_tokens(tokenizer, PROMPT)
