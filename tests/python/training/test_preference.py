"""Runs with --dpo: the loss and its gradient, the reference, resuming, bad pairs.

The class of fault: pairs that are mixed up, a reference that moves with the model or is lost on
resume, a gradient that is not the loss's, a cut that leaves the same answer twice.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversing import rows, write_base, write_rows
from gptc import Model
from gptc.checkpoint.reader import Checkpoint
from gptc.data.chat_cache import resolve_chats
from gptc.data.pairs import Pairs
from gptc.engine.lora import Lora
from gptc.errors import GptcError, UsageError
from gptc.formats.safetensors import tensor_chunks
from gptc.training import reference
from gptc.training.curves import read_curves
from gptc.training.plot import draw
from gptc.training.preference import backward, log_probabilities, pair_losses
from gptc.training.reference import REFERENCE
from gptc.training.run import train
from runs import content, metrics, reproducible


def pairs(n: int) -> list[dict[str, Any]]:
    """The JSON is chosen, a sentence rejected."""
    return [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"So {i} it is."}
        for i, row in enumerate(rows(n))
    ]


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A short run on 30 pairs; the cache is empty."""
    monkeypatch.setenv("GPTC_CACHE", str(tmp_path / "cache"))
    return {
        "init_from": str(write_base(tmp_path / "base")),
        "data": str(write_rows(tmp_path / "pairs.jsonl", pairs(30))),
        "out": str(tmp_path / "run"),
        "dpo": True,
        "device": "cpu",
        "dtype": "fp32",
        "threads": 1,
        "batch_size": 2,
        "grad_accum": 2,
        "seq_len": 96,
        "steps": 6,
        "lr": 1e-3,
        "lora_rank": 4,
        "eval_every": 3,
    }


def test_the_loss_of_a_pair_and_its_slopes() -> None:
    rng = np.random.default_rng(0)
    logps, reference = rng.normal(-20, 5, (5, 2)), rng.normal(-20, 5, (5, 2))
    found = pair_losses(logps, reference, 0.3)
    margin = 0.3 * ((logps - reference)[:, 0] - (logps - reference)[:, 1])
    assert np.allclose(found.losses, np.log(1 + np.exp(-margin)))
    for k in range(2):
        step = np.zeros(2)
        step[k] = 1e-6
        up, down = (pair_losses(logps + s * step, reference, 0.3).losses for s in (1, -1))
        assert np.allclose(found.slopes[:, k], (up - down) / 2e-6, atol=1e-7)
    measures = found.measures()
    assert measures["reward_margin"] == pytest.approx(margin.mean())
    assert measures["reward_accuracy"] == np.mean(margin > 0)
    far = pair_losses(np.array([[-1e5, 0.0]]), np.zeros((1, 2)), 0.1)
    assert far.losses[0] == pytest.approx(1e4)
    assert np.isfinite(far.slopes).all()


def test_the_gradient_is_that_of_the_loss(options: dict[str, Any]) -> None:
    base = Path(options["init_from"])
    dataset = resolve_chats(options["data"], Checkpoint(base).tokenizer())
    some = Pairs(dataset, "train", 96).batch(range(3))
    reference = np.random.default_rng(1).normal(-150, 3, (3, 2))
    with Model.load(base, threads=1, training=True, max_batch=6, dtype="fp32") as model:

        def loss() -> float:
            logps = log_probabilities(model.losses(some.inputs, some.targets))
            return float(pair_losses(logps, reference, 0.1).losses.mean())

        found = backward(model, some, reference, 0.1, 3)
        assert found.losses.mean() == pytest.approx(loss(), rel=1e-5)
        gradients = model.gradients()
        name = (
            "h.1.mlp.proj.weight"
            if "h.1.mlp.proj.weight" in gradients
            else next(n for n, g in gradients.items() if n.startswith("h.1.") and g.ndim == 2)
        )
        direction, before = gradients[name], model.get(name)
        direction = direction / np.linalg.norm(direction)
        ends = []
        for sign in (1, -1):
            model.set(name, before + sign * 1e-3 * direction)
            ends.append(loss())
        slope = (ends[0] - ends[1]) / 2e-3
        assert slope == pytest.approx(np.linalg.norm(gradients[name]), rel=2e-3)


def test_a_run_prefers_the_chosen_answers(options: dict[str, Any], tmp_path: Path) -> None:
    summary = train(options | {"steps": 20, "eval_every": 10, "lr": 8e-3})
    lines = metrics(options["out"])
    first, last = lines[0], lines[-1]
    assert first["train_loss"] == pytest.approx(np.log(2), rel=1e-6)  # the model is its reference
    assert first["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert last["val_loss"] < 0.5 * first["train_loss"]
    assert last["val_accuracy"] == 1
    assert last["val_margin"] > 1
    assert last["reward_chosen"] > last["reward_rejected"]
    assert summary.val_accuracy == 1
    assert summary.val_bpb is None
    draw([read_curves(options["out"])], tmp_path / "curves.html")
    assert "margin of rewards" in (tmp_path / "curves.html").read_text()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_reference_of_rounded_weights_is_the_model(options: dict[str, Any], dtype: str) -> None:
    train(options | {"steps": 1, "dtype": dtype})
    assert metrics(options["out"])[0]["train_loss"] == pytest.approx(np.log(2), rel=1e-6)


def test_a_reference_that_is_not_finite_is_refused(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "reference_of", lambda *_: np.full((1, 2), np.nan))
    with pytest.raises(GptcError, match="by the model before training are not finite: check"):
        train(options)


@pytest.mark.parametrize("is_lost", [False, True])
def test_an_interrupted_run_ends_with_the_same_bits(
    options: dict[str, Any], tmp_path: Path, is_lost: bool
) -> None:
    """Also when the file of the reference is lost, since the base under the adapters is there."""
    whole, parts = ({**options, "out": str(tmp_path / name)} for name in ("whole", "parts"))
    train(whole)

    def interrupt(step: int, model: Model) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(parts, on_step=interrupt).step == 2
    if is_lost:
        (tmp_path / "parts" / REFERENCE).unlink()
    with pytest.raises(UsageError, match="--dpo-beta cannot change on --resume"):
        train({"dpo_beta": 0.5}, resume=tmp_path / "parts")
    assert train({}, resume=tmp_path / "parts").finished
    last = [Path(run["out"]) / "ckpt-000006" for run in (whole, parts)]
    assert content(last[0]) == content(last[1])
    files = [(Path(run["out"]) / REFERENCE).read_bytes() for run in (whole, parts)]
    assert files[0] == files[1]
    lines = [reproducible(metrics(run["out"])) for run in (whole, parts)]
    assert lines[0] == lines[1]


def test_all_weights_need_the_file_of_the_reference(options: dict[str, Any]) -> None:
    train(options | {"lora_rank": 0, "steps": 3})
    assert train({"steps": 4}, resume=options["out"]).finished
    path = Path(options["out"]) / REFERENCE
    good = path.read_bytes()
    path.write_bytes(good[:-152] + bytes([good[-152] ^ 1]) + good[-151:])
    for _ in range(2):
        with pytest.raises(GptcError, match="is missing, damaged or of other data"):
            train({"steps": 5}, resume=options["out"])
        path.unlink(missing_ok=True)


def test_a_flipped_bit_of_the_reference_is_noticed(tmp_path: Path) -> None:
    """A number that stays finite too; a file of an older version, without a checksum, is read."""
    path, of = tmp_path / REFERENCE, np.arange(65, dtype=np.float32)
    values = np.random.default_rng(0).normal(-9, 3, (6, 2)).astype(np.float32)
    splits: Any = {"train": range(4), "val": range(2)}
    tensors = {"of": of, "train": values[:4], "val": values[4:]}
    reference._write(path, tensors)
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        found = reference._read(path, splits, of)
        for split in splits if found else ():
            assert np.array_equal(found[split], tensors[split]), (split, at)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    path.write_bytes(b"".join(tensor_chunks(shapes, tensors.__getitem__)))
    found = reference._read(path, splits, of)
    assert np.array_equal(found["train"], values[:4])
    odd = {"of": of, "\ud800": values[:1], "checksum": of[:32]}
    shapes = {name: tensor.shape for name, tensor in odd.items()}
    path.write_bytes(b"".join(tensor_chunks(shapes, odd.__getitem__)))
    assert reference._read(path, splits, of) is None


def test_pairs_that_are_cut_to_the_same_answer_are_left_out(options: dict[str, Any]) -> None:
    some = pairs(12)
    same = "word " * 200
    some[3] |= {"chosen": same + "yes", "rejected": same + "no"}
    data = str(write_rows(Path(options["data"]), some))
    dataset = resolve_chats(data, Checkpoint(Path(options["init_from"])).tokenizer())
    splits = [Pairs(dataset, split, 96) for split in ("train", "val")]
    assert sum(map(len, splits)) == 11
    assert sum(split.n_empty for split in splits) == sum(split.n_long for split in splits) == 1
    batch = splits[0].batch([0, 1])
    assert batch.inputs.shape[0] == 4
    prompts = [row[: int(np.argmax(t >= 0))] for row, t in zip(*batch[:2], strict=True)]
    assert np.array_equal(prompts[0], prompts[2])
    assert np.array_equal(prompts[1], prompts[3])
    assert not np.array_equal(batch.targets[0], batch.targets[2])


def test_what_excludes_pairs_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    chats = str(write_rows(tmp_path / "chats.jsonl", rows(10)))
    for change, words in (
        ({"data": chats}, "--dpo needs rows with chosen and rejected"),
        ({"dropout": 0.1}, "--dropout 0.1 with --dpo"),
        ({"lora_dropout": 0.1}, "--lora-dropout 0.1 with --dpo"),
        ({"label_smoothing": 0.1}, "--label-smoothing 0.1 changes the loss of tokens"),
        ({"z_loss": 1e-4}, "--z-loss 0.0001 changes the loss of tokens"),
        ({"packing": "fit"}, "--packing fit excludes --dpo"),
        ({"train_on": "all"}, "--train-on all excludes --dpo"),
    ):
        with pytest.raises(GptcError, match=words):
            train(options | change)


def test_losses_that_are_not_finite_stop_a_run(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(GptcError, match="is not finite") as caught:
        train(options | {"lr": 1e20, "warmup_steps": 0, "lora_rank": 4})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("bad-step-*.npz"))


def test_bad_pairs_are_counted(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    some = pairs(12)
    some[2]["rejected"] = some[2]["chosen"]
    del some[5]["rejected"]
    write_rows(Path(options["data"]), some)
    with pytest.raises(GptcError, match="line 3: its chosen and rejected answers are the same"):
        train(options)
    train(options | {"on_bad_row": "skip", "steps": 1})
    assert "2 bad rows left out" in capsys.readouterr().err


def test_pairs_without_dpo_say_what_is_learned(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for dpo in (True, False):
        train(options | {"dpo": dpo, "steps": 1, "out": f"{options['out']}-{dpo}"})
        assert ("only chosen answers are learned" in capsys.readouterr().err) == (not dpo)


def test_weights_of_another_shape_are_refused(options: dict[str, Any]) -> None:
    lora = Lora(2, 4.0, ("q",))
    with Model.load(
        options["init_from"], threads=1, training=True, max_batch=2, lora=lora
    ) as model:
        x = np.ones((2, 8), np.int32)
        with pytest.raises(GptcError, match="weights have the shape"):
            model.backward_weighted(x, x, lambda losses: losses[:1])
