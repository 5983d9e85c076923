"""`gptc eval` computes the loss that training reports, in every precision."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.data.dataset import Dataset
from gptc.errors import GptcError
from gptc.eval.loss import evaluate
from gptc.generation.decoder import generate

Gptc = Callable[..., Any]


@pytest.fixture
def run(gptc: Gptc, arguments: list[str], options: dict[str, Any]) -> Path:
    """A run of a few steps."""
    assert gptc("train", *arguments).code == 0
    return Path(options["out"])


def test_eval_is_what_training_reported(gptc: Gptc, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_loss" in line][-1]
    batch = json.loads((run / f"ckpt-{last['step']:06d}" / "trainer.json").read_text())["options"]
    ran = gptc(
        "eval", "-m", run, "--seq-len", batch["seq_len"], "--batch-size", batch["batch_size"],
        "--batches", batch["eval_batches"] or 10**6, "--json",
    )  # fmt: skip
    result = json.loads(ran.out)["results"][0]
    assert result["loss"] == pytest.approx(last["val_loss"], rel=2e-3)  # bf16 there, fp32 here
    assert result["bpb"] == pytest.approx(last["val_bpb"], rel=2e-3)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_the_last_evaluation_is_of_the_whole_split(
    gptc: Gptc, arguments: list[str], options: dict[str, Any]
) -> None:
    arguments[arguments.index("--eval-batches") + 1] = "9"
    ran = gptc("train", *arguments, "--dtype", "fp32", "--json")
    summary = json.loads(ran.out)
    assert re.search(r"step 4/8  val loss .*  \(over 9 batches\)\n", ran.err)
    assert re.search(r"step 8/8  val loss [\d.]+  val bpb [\d.]+\n", ran.err)
    result = json.loads(gptc("eval", "-m", options["out"], "--json").out)["results"][0]
    assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)


def test_a_window_longer_than_the_context_is_refused(gptc: Gptc, run: Path) -> None:
    ran = gptc("eval", "-m", run, "--seq-len", 17)
    assert (ran.code, ran.err) == (
        2,
        "gptc: error: --seq-len is 17; the model's context allows at most 16\n",
    )


def test_rounded_weights_cost_little(gptc: Gptc, run: Path) -> None:
    ran = gptc("eval", "-m", run, "--quantize", "int8", "--quantize", "int4", "--json")
    rows = json.loads(ran.out)["results"]
    assert [row["dtype"] for row in rows][1:] == ["int8", "int4"]
    assert abs(rows[1]["cost"]) < 0.01
    assert abs(rows[2]["cost"]) < 0.1
    assert rows[1]["loss"] != rows[0]["loss"]
    plain = gptc("eval", "-m", run, "--quantize", "int8").out
    assert "int8" in plain
    assert "%" in plain


def test_an_int8_cache_costs_little(gptc: Gptc, run: Path) -> None:
    for dtype in ("fp32", "bf16"):
        asked = ("eval", "-m", run, "--kv-dtype", "int8", "--dtype", dtype)
        exact, rounded = json.loads(gptc(*asked, "--json").out)["results"]
        assert (exact["kv_dtype"], rounded["kv_dtype"]) == ("auto", "int8")
        assert exact["tokens"] == rounded["tokens"]
        assert 0 < abs(rounded["cost"]) < 0.003
        plain = json.loads(gptc("eval", "-m", run, "--dtype", dtype, "--json").out)["results"]
        assert exact["loss"] == pytest.approx(
            plain[0]["loss"], rel=1e-5 if dtype == "fp32" else 1e-3
        )
    assert re.search(r"bf16, int8 cache +loss .*%", gptc(*asked).out)


def test_another_tokenizers_data_is_refused(gptc: Gptc, run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a tale of another kind\n" * 200)
    assert gptc("prepare", text, "--out", tmp_path / "d", "--tokenizer", "char").code == 0
    ran = gptc("eval", "-m", run, "--data", tmp_path / "d")
    assert ran.code == 1
    assert "tokenizer" in ran.err
    assert "gptc prepare" in ran.err


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_model_with_rounded_weights_writes(dtype: str, run: Path) -> None:
    from gptc.checkpoint.find import open_checkpoint

    checkpoint = open_checkpoint(run)
    with load_model(checkpoint, dtype=dtype, device="cpu") as model:
        texts = generate(model, checkpoint.tokenizer(), "the", max_tokens=8, num_samples=2)
        assert len(texts) == 2
        again = generate(model, checkpoint.tokenizer(), "the", max_tokens=8, num_samples=2)
        assert texts == again


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_decoding_step_by_step_equals_the_whole(dtype: str, config: Callable[..., Any]) -> None:
    shape = config("llama", n_embd=64, n_head=2, n_kv_head=2)
    with Model.create(shape, dtype=dtype, training=False, max_batch=1, device="cpu") as model:
        tokens = np.arange(12, dtype=np.int32)[None] % shape.vocab_size
        whole = model.logits(tokens)[0]
        with model.session() as session:
            steps = np.stack([session.decode([token]) for token in tokens[0]])
    assert np.abs(whole - steps).max() <= 0.03 * np.abs(whole).max()  # bf16 on the way


def test_rounded_weights_are_not_trained(config: Callable[..., Any]) -> None:
    with pytest.raises(GptcError, match="cannot be trained"):
        Model.create(config(), dtype="int8", device="cpu")


def test_the_mean_is_over_tokens(model: Model, dataset_folder: Path) -> None:
    dataset = Dataset.open(dataset_folder)
    seen: list[tuple[int, int]] = []
    result = evaluate(model, dataset, batch_size=3, seq_len=16, progress=lambda *n: seen.append(n))
    assert seen[-1] == (result.tokens, result.tokens)
    alone = evaluate(model, dataset, batch_size=1, seq_len=16)
    assert result.tokens == alone.tokens
    assert result.loss == pytest.approx(alone.loss, rel=1e-5)


def test_a_model_in_a_file_with_a_tokenizer_of_its_own(
    gptc: Gptc, arguments: list[str], text_file: Path, tmp_path: Path
) -> None:
    """A dataset with the model's tokenizer works; with a different one, the error has advice."""
    data, other, file = tmp_path / "d", tmp_path / "other", tmp_path / "m.gguf"
    assert gptc("prepare", text_file, "--out", data, "--tokenizer", "bpe:300").code == 0
    assert gptc("prepare", text_file, "--out", other, "--tokenizer", "char").code == 0
    assert gptc("train", *arguments[2:], "--data", data, "--steps", 1).code == 0
    assert gptc("export", "-m", tmp_path / "run", "--to", "gguf", "--out", file).code == 0

    sizes = ("--steps", 1, "--batch-size", 2, "--seq-len", 16)
    tuned = ("train", "--init-from", file, "--out", tmp_path / "tuned", *sizes)
    assert gptc(*tuned, "--data", data).code == 0
    resumed = ("train", "--resume", tmp_path / "tuned", "--steps", 2)
    assert gptc(*resumed).code == 0
    assert gptc("eval", "-m", file, "--data", data).code == 0

    for command in (("train", "--init-from", file), ("eval", "-m", file)):
        ran = gptc(*command, "--data", tmp_path / "nothing.txt")
        assert "no dataset '" in ran.err
        ran = gptc(*command, "--data", other)
        assert ran.code == 1
        assert "other with char" in ran.err
        assert f"gptc prepare SOURCE --out DIR --tokenizer {file}" in ran.err

    again = tmp_path / "again"  # a text is prepared with the file's tokenizer
    assert gptc("prepare", text_file, "--out", again, "--tokenizer", file).code == 0
    assert Dataset.open(again).tokenizer.fingerprint() == Dataset.open(data).tokenizer.fingerprint()
    results = [
        json.loads(gptc("eval", "-m", file, "--data", text, "--split", "all", "--json").out)
        for text in (data, text_file)
    ]
    assert results[0]["results"] == results[1]["results"]
    ran = gptc(
        "train", "--init-from", file, "--out", tmp_path / "more", *sizes, "--data", text_file
    )
    assert ran.code == 0
    assert gptc("train", "--resume", tmp_path / "more", "--steps", 2).code == 0


def test_ngrams_are_counted_in_the_training_split(gptc: Gptc, run: Path) -> None:
    ran = gptc("eval", "-m", run, "--ngram", "2", "--json")
    answer = json.loads(ran.out)
    rows = answer["ngrams"]
    assert [row["order"] for row in rows] == [0, 1, 2]
    dataset = Dataset.open(answer["data"])
    text = [dataset.shard(split, 0) for split in ("train", "val")]
    counts = np.bincount(text[0], minlength=dataset.vocab_size)
    assert rows[0]["loss"] == pytest.approx(math.log(dataset.vocab_size))
    # Discounts and the share of unseen tokens are small here.
    seen = counts[text[1]] > 0
    assert seen.mean() > 0.99
    unigram = -np.log(counts[text[1][seen]] / counts.sum()).mean()
    assert rows[1]["loss"] == pytest.approx(unigram, rel=0.05)
    assert rows[2]["loss"] < rows[1]["loss"]
    model = answer["results"][0]["bpb"]
    assert rows[2]["model"] == pytest.approx(model / rows[2]["bpb"] - 1)
    assert "2-gram  loss" in gptc("eval", "-m", run, "--ngram", "2").out
    refused = gptc("eval", "-m", run, "--ngram", "2", "--split", "all")
    assert refused.code == 2
    assert "--ngram counts the training split, which --split all contains" in refused.err
