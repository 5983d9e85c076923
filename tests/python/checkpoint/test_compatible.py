"""A model and its data use the same tokenizer, or training refuses them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint.find import find_checkpoint, load_tokenizer
from gptc.checkpoint.reader import Checkpoint
from gptc.data.dataset import Dataset
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError, UsageError
from gptc.settings import read_toml
from gptc.training.options import TrainOptions
from gptc.training.run import train

Options = dict[str, Any]


def test_another_tokenizer_is_refused(options: Options, text_file: Path, tmp_path: Path) -> None:
    from gptc.data.preparation import prepare

    train(options)
    prepare([str(text_file)], tmp_path / "chars", tokenizer="char")
    with pytest.raises(GptcError) as caught:
        train({"init_from": options["out"], "data": str(tmp_path / "chars"), "steps": 1})
    message = str(caught.value)
    assert "ckpt-000008 was made with the bytes tokenizer (256 tokens)" in message
    assert "chars with char (" in message
    assert message.endswith("with: gptc prepare SOURCE --out DIR --tokenizer bytes")
    with pytest.raises(GptcError, match="was made with the bytes tokenizer"):
        train({"data": str(tmp_path / "chars")}, resume=options["out"])


@pytest.mark.parametrize("own", ["char", "bpe:300"])
def test_a_prepared_folder_has_its_tokenizer(
    options: Options, text_file: Path, tmp_path: Path, own: str
) -> None:
    from gptc.data.preparation import prepare

    folder = prepare([str(text_file)], tmp_path / "prepared", tokenizer=own).folder
    for given in ("gpt2", "bytes", "bpe:301"):
        with pytest.raises(UsageError, match=f"prepared was prepared with {own}: leave "):
            train({**options, "data": str(folder), "tokenizer": given})
    assert not Path(options["out"]).exists()
    # None, its name, and its folder; the recorded name can be given again.
    recorded = {}
    for given in (None, own, str(folder)):
        out = tmp_path / str(len(recorded))
        tokenizer = {} if given is None else {"tokenizer": given}
        train({**options, "data": str(folder), "steps": 1, "out": str(out), **tokenizer})
        recorded[given] = read_toml(TrainOptions, out / "config.toml")["tokenizer"]
        assert train({"steps": 2}, resume=out).step == 2
    assert set(recorded.values()) == {own}
    # One that was learned elsewhere is named by the folder that holds it.
    other = prepare([str(text_file)], tmp_path / "other", tokenizer=str(folder)).folder
    for n in range(2):
        given = {"tokenizer": str(other)} if n else {}
        summary = train({**options, "data": str(other), "out": str(tmp_path / f"o{n}"), **given})
        assert summary.options["tokenizer"] == str(other)
        assert train({"steps": 9}, resume=summary.out).step == 9


def test_text_is_cut_with_the_models_own_tokenizer(
    options: Options, text_file: Path, tmp_path: Path
) -> None:
    first = train({**options, "data": str(text_file), "tokenizer": "char"})
    tuned = train(
        {"init_from": first.out, "data": str(text_file), "steps": 1, "out": str(tmp_path / "t")}
    )
    tokenizers = [Checkpoint(find_checkpoint(s.out)).tokenizer() for s in (first, tuned)]
    assert tokenizers[0].kind == "char"
    assert tokenizers[0].fingerprint() == tokenizers[1].fingerprint()


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_a_learned_tokenizer_goes_with_the_run(
    options: Options, text_file: Path, tmp_path: Path, tokenizer: str
) -> None:
    text = tmp_path / "text"
    shutil.copy(text_file, text)
    first = train({**options, "data": str(text), "tokenizer": tokenizer})
    assert read_toml(TrainOptions, Path(first.out) / "config.toml")["tokenizer"] == tokenizer
    caches = list((Path(os.environ["GPTC_CACHE"]) / "datasets").glob("text-*"))
    own = Checkpoint(find_checkpoint(first.out)).tokenizer().fingerprint()
    train({"steps": 9}, resume=first.out)
    # Nothing is prepared a second time.
    assert list((Path(os.environ["GPTC_CACHE"]) / "datasets").glob("text-*")) == caches
    with pytest.raises(UsageError, match=f"--tokenizer cannot change .* was {tokenizer}"):
        train({"tokenizer": "bytes"}, resume=first.out)
    text.write_text(text.read_text().replace("king", "bear"))
    train({"steps": 10}, resume=first.out)
    assert Checkpoint(find_checkpoint(first.out)).tokenizer().fingerprint() == own


def test_a_run_stands_for_its_newest_checkpoint(
    gptc: Callable[..., Any], options: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    run = train({**options, "data": str(text_file), "tokenizer": "bpe:300", "steps": 4}).out
    own = load_tokenizer(run).fingerprint()
    ran = gptc("prepare", text_file, "--tokenizer", run, "--out", tmp_path / "data")
    assert (ran.code, ran.err) == (0, "")
    assert Dataset.open(tmp_path / "data").tokenizer.fingerprint() == own
    again = train({**options, "data": str(text_file), "tokenizer": run, "out": str(tmp_path / "2")})
    assert load_tokenizer(again.out).fingerprint() == own
    (tmp_path / "empty").mkdir()
    ran = gptc("prepare", text_file, "--tokenizer", tmp_path / "empty", "--out", tmp_path / "no")
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert "give the folder of a dataset, checkpoint or run" in ran.err


def test_a_hugging_face_model_with_too_few_tokens(options: Options, tmp_path: Path) -> None:
    shape = GPTConfig.preset("gpt2", vocab_size=100, n_layer=1, n_head=1, n_embd=8, block_size=16)
    with Model.create(shape, threads=1) as model:
        model.save(tmp_path / "hf")
    with pytest.raises(GptcError, match=r"a vocabulary of 256 \(bytes tokenizer\), .* one of 100"):
        train({"init_from": str(tmp_path / "hf"), "data": options["data"]})
