"""Documents that share a row of a batch do not read each other: --packing documents.

The class of fault: a context that crosses the end of a document, an end that belongs to the
document before it, an evaluation that reads what training did not, batches that depend on an
interrupt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversing import rows, write_rows
from corpus import write_documents
from gptc import Model
from gptc.data.dataset import Dataset
from gptc.data.loader import Loader
from gptc.data.mixture import MixedLoader, Mixture
from gptc.data.weights import Weighted
from gptc.errors import UsageError
from gptc.settings import read_toml
from gptc.training.options import TrainOptions
from gptc.training.run import train
from runs import content, metrics, reproducible

Options = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def documents(options: Options, folder: Path) -> Options:
    """Options of a run that keeps documents apart."""
    return options | {"data": str(folder), "packing": "documents", "seq_len": 48, "dtype": "fp32"}


def recorded_packing(run: Path) -> Any:
    return read_toml(TrainOptions, run / "config.toml")["packing"]


def apart(folder: Path) -> Dataset:
    dataset = Dataset.open(folder)
    dataset.keep_apart()
    return dataset


def test_positions_begin_again_at_each_end(folder: Path) -> None:
    dataset = apart(folder)
    end = dataset.tokenizer.end_of_text
    assert dataset.positions(np.array([[5, 6, end, 7, end, end, 8]], np.int32)).tolist() == [
        [0, 1, 0, 1, 0, 0, 1]
    ]
    with closing(Loader(dataset, "train", 4, 48, seed=1)) as loader:
        found = loader.next_rows()
    expected = np.zeros((4, 48), np.int32)
    for b, t in np.ndindex(4, 48):
        is_first = t == 0 or found.inputs[b, t] == end
        expected[b, t] = 0 if is_first else expected[b, t - 1] + 1
    np.testing.assert_array_equal(found.positions, expected)
    assert (expected[:, 1:] == 0).any()
    with closing(Loader(Dataset.open(folder), "train", 4, 48, seed=1)) as stream:
        same = stream.next_rows()
    assert same.positions is None
    np.testing.assert_array_equal(same.inputs, found.inputs)


@pytest.mark.parametrize("preset", ["gpt2", "tiny"])
def test_a_document_in_a_row_has_the_losses_that_it_has_alone(
    folder: Path, config: Callable[..., Any], preset: str
) -> None:
    dataset = apart(folder)
    with closing(Loader(dataset, "train", 3, 48, seed=2)) as loader:
        batch = loader.next_rows()
    shape = config(preset=preset, vocab_size=dataset.vocab_size, block_size=48)
    with Model.create(shape, threads=1, max_batch=3, seed=3) as model:
        losses = model.losses(batch.inputs, batch.targets, batch.positions)
        n_alone = 0
        for row, x, y in zip(losses, batch.inputs, batch.targets, strict=True):
            begins = [0, *np.flatnonzero(x[1:] == dataset.document_end) + 1]
            for begin, stop in zip(begins, [*begins[1:], 48], strict=True):
                alone = model.losses(x[None, begin:stop], y[None, begin:stop])[0]
                np.testing.assert_allclose(row[begin:stop], alone, rtol=1e-4, atol=1e-5)
                n_alone += 1
        assert n_alone > 6
        as_one = model.losses(batch.inputs, batch.targets)
        assert abs(as_one - losses).max() > 1e-3


def test_an_interrupted_run_ends_with_the_same_bits(
    documents: Options, folder: Path, tmp_path: Path, gptc: Callable[..., Any]
) -> None:
    documents["data"] = (f"{folder}:0.6", f"{write_documents(tmp_path / 'other')}:0.4")
    documents["save_every"] = 4
    whole = train(documents)
    lines = reproducible(metrics(documents["out"]))
    parts = {**documents, "out": str(tmp_path / "parts")}

    def crash(step: int, model: Any) -> None:
        if step == 6:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(parts, on_step=crash)
    with pytest.raises(UsageError, match=r"--packing cannot change on --resume \(it was documents"):
        train({"packing": "stream"}, resume=parts["out"])
    train({}, resume=parts["out"])
    assert reproducible(metrics(parts["out"])) == lines
    ends = (Path(o["out"]) / "ckpt-000008" for o in (documents, parts))
    assert content(next(ends)) == content(next(ends))
    stream = train({**documents, "packing": "stream", "out": str(tmp_path / "stream")})
    assert stream.val_loss != whole.val_loss


def test_a_mixture_draws_the_positions_of_its_parts(folder: Path) -> None:
    found = [Weighted("a", 0.5), Weighted("b", 0.5)]
    mixture = Mixture(found, [Dataset.open(folder), Dataset.open(folder)])
    mixture.keep_apart()
    with closing(MixedLoader(mixture, "train", 4, 48, seed=2)) as loader:
        batch = loader.next_rows()
    expected = mixture.parts[1].dataset.positions(batch.inputs)
    assert expected is not None
    np.testing.assert_array_equal(batch.positions, expected)


def test_an_evaluation_reads_as_training_did(
    documents: Options, gptc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = train({**documents, "eval_batches": 0})
    command = ("eval", "-m", documents["out"], "--seq-len", 48, "--device", "cpu", "--threads", 2)
    own = gptc(*command).out
    assert f"loss {summary.val_loss:.4f}" in own
    assert "(val, by document, " in own
    assert f"loss {summary.val_loss:.4f}" in gptc(*command, "--packing", "documents").out
    stream = gptc(*command, "--packing", "stream")
    assert stream.code == 0
    assert f"loss {summary.val_loss:.4f}" not in stream.out
    assert "by document" not in stream.out
    for given, packing in ((), "documents"), (("--packing", "stream"), "stream"):
        results = json.loads(gptc(*command, *given, "--batches", 1, "--json").out)["results"]
        assert [row["packing"] for row in results] == [packing]
    monkeypatch.setattr("gptc.checkpoint.facade.load_model", lambda *_, **__: 1 / 0)
    cached = gptc(*command, "--kv-dtype", "int8")
    assert cached.code == 2
    assert "--kv-dtype int8 decodes a window as one text: use --packing stream" in cached.err


def test_fine_tuning_keeps_documents_apart_as_its_model_did(
    documents: Options, tmp_path: Path
) -> None:
    train(documents)
    shape = {"preset", "n_layer", "n_head", "n_embd", "n_ff", "packing"}
    tuned = {k: v for k, v in documents.items() if k not in shape} | {"steps": 1}
    chats = str(write_rows(tmp_path / "chats.jsonl", rows(20)))
    for changes, found in (
        ({}, "documents"),
        ({"packing": "stream"}, "stream"),
        ({"data": chats, "train_on": "all"}, "pad"),
    ):
        out = tmp_path / found
        train({**tuned, "init_from": documents["out"], **changes, "out": str(out)})
        assert recorded_packing(out) == found


def test_an_older_run_of_texts_has_recorded_the_packing_of_conversations(
    options: Options, tmp_path: Path, gptc: Callable[..., Any]
) -> None:
    old = tmp_path / "old.toml"
    values = {**options, "packing": "pad"}
    old.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    ran = gptc("train", "--config", old)
    assert ran.code == 0, ran.err
    assert recorded_packing(Path(options["out"])) == "stream"


def test_a_packing_that_does_not_suit_the_data(
    documents: Options, dataset_folder: Path, tmp_path: Path, folder: Path
) -> None:
    chats = str(write_rows(tmp_path / "chats.jsonl", rows(20)))
    for data, packing, message in (
        (str(dataset_folder), "documents", "has none: prepare the text with another --tokenizer"),
        (str(folder), "fit", "--packing fit is for conversations, and .* has texts: use stream or"),
        (chats, "documents", "--packing documents is for texts, and .* has conversations: use pad"),
    ):
        with pytest.raises(UsageError, match=message):
            train(documents | {"data": data, "packing": packing})
    assert not Path(documents["out"]).exists()
