"""The whole model agrees with Hugging Face's, run live or stored in tests/golden."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import family_table
import reference
from gptc import AdamW, Model
from gptc.checkpoint.reader import Checkpoint
from gptc.convert.export_model import export_model
from gptc.engine.config import GPTConfig
from gptc.formats import hf

Array = npt.NDArray[Any]

HAVE_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
TOLERANCE = 1e-4  # norm-wise


class Weights:
    """Random weights for the tensors of this configuration."""

    def __init__(self, config: GPTConfig) -> None:
        self.values = reference.weights({part.name: part.shape for part in hf.parts(config)})
        self.shapes = {name: values.shape for name, values in self.values.items()}

    def read(self, name: str) -> Array:
        return self.values[name]


def make_model(case: reference.Case) -> Model:
    config = hf.config_from_json(case.config, "config.json")
    model = Model.create(config, max_batch=case.B, max_seq=case.T)
    hf.import_tensors(config, Weights(config), "weights", model.set)
    return model


_seen: dict[str, dict[str, Array]] = {}
Record = Callable[[str, object], None]


def expected(case: reference.Case, source: str) -> dict[str, Array]:
    if source == "live":  # of two tests that follow one another
        if case.name not in _seen:
            _seen.clear()
            _seen[case.name] = reference.run(case)
        return _seen[case.name]
    with np.load(reference.golden_path(case)) as golden:
        return dict(golden)


def error(got: Array, want: Array) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


LIVE = [
    pytest.mark.parity,
    pytest.mark.skipif(not HAVE_TORCH, reason="needs torch and transformers"),
]
ALL = [*reference.CASES, *reference.OTHERS, *reference.FAMILIES, *reference.ARCHITECTURES]
GOLDEN = [*reference.CASES, *reference.ARCHITECTURES]
NO_GGUF = {name for name, column in family_table.MISSING if column == "GGUF in"}
NO_READER = {name for name, column in family_table.MISSING if column == "GGUF out"}
# Token by token, which takes a second: needed where the length of a text changes its frequencies.
GENERATED = ("gpt2", "llama", "llama-dynamic")
RUNS = [pytest.param(case, "golden", id=f"golden-{case.name}") for case in GOLDEN]
RUNS += [pytest.param(case, "live", id=f"live-{case.name}", marks=LIVE) for case in ALL]


@pytest.mark.parametrize(("case", "source"), RUNS)
def test_logits_loss_and_every_gradient(
    case: reference.Case, source: str, record_property: Record
) -> None:
    want = expected(case, source)
    tokens = reference.batches(case)[0].astype(np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with make_model(case) as model:
        record_property("logits", off := error(model.logits(inputs), want["logits"]))
        assert off < TOLERANCE
        assert model.loss(inputs, targets) == pytest.approx(want["losses"][0], rel=TOLERANCE)
        assert model.backward(inputs, targets) == pytest.approx(want["losses"][0], rel=TOLERANCE)
        ours = model.gradients()
        compared, most = 0, 0.0
        for part in hf.parts(model.config):
            got = hf.export_tensor(part._replace(minus_one=False), ours[part.ours])
            # Softmax is invariant to a shift of all scores, so the gradient of key biases is zero
            # up to rounding on both sides. Measure it against the whole bias.
            if part.name.endswith("c_attn.bias"):
                C = model.config.n_embd
                full = want[f"grad.{part.name}"]
                rounding = np.linalg.norm(got[C : 2 * C] - full[C : 2 * C])
                assert rounding < TOLERANCE * np.linalg.norm(full)
            compared += 1
            if not want[f"grad.{part.name}"].any():  # an expert without tokens
                assert not got.any(), part.name
                continue
            most = max(most, off := error(got, want[f"grad.{part.name}"]))
            assert off < TOLERANCE, part.name
        record_property("gradients", most)
        assert compared == sum(name.startswith("grad.") for name in want)


@pytest.mark.parametrize(("case", "source"), RUNS)
def test_ten_updates_give_the_same_losses(
    case: reference.Case, source: str, record_property: Record
) -> None:
    want = expected(case, source)["losses"]
    adamw = AdamW(**reference.ADAMW, grad_clip=reference.GRAD_CLIP)
    with make_model(case) as model:
        got = []
        for tokens in reference.batches(case).astype(np.int32):
            got.append(model.backward(tokens[:, :-1], tokens[:, 1:]))
            model.update(adamw)
    record_property("ten steps", float(np.max(np.abs(got / want - 1))))
    np.testing.assert_allclose(got, want, rtol=TOLERANCE)


@pytest.mark.parity
@pytest.mark.skipif(not HAVE_TORCH, reason="needs torch and transformers")
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_saved_model_loads_in_transformers(
    case: reference.Case, tmp_path: Path, record_property: Record
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = reference.batches(case)[0].astype(np.int32)[:, :-1]
    with make_model(case) as model:
        model.save(tmp_path / "model")
        ours = model.logits(tokens)
        with model.session(*tokens.shape) as session:
            seqs = np.repeat(np.arange(len(tokens)), tokens.shape[1])
            states = session.states(tokens.ravel(), seqs, np.ones(tokens.size, bool))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        hidden = theirs.base_model(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    record_property("folder out", off := error(ours, logits))
    assert off < TOLERANCE
    record_property("states", off := error(states, hidden.reshape(states.shape)))
    assert off < TOLERANCE


@pytest.mark.parity
@pytest.mark.skipif(not HAVE_TORCH, reason="needs torch and transformers")
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_what_transformers_saves_in_several_files_loads_here(
    case: reference.Case, tmp_path: Path, record_property: Record
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: deepcopy(value) for key, value in case.config.items() if key != "model_type"}
    torch.manual_seed(0)
    shape = AutoConfig.for_model(case.kind, **settings, initializer_range=0.3)
    theirs = AutoModelForCausalLM.from_config(shape).eval()
    theirs.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    tokens = reference.batches(case)[0].astype(np.int32)[:, :-1]
    with Model.load(tmp_path / "model", max_batch=case.B, max_seq=case.T) as model:
        ours = model.logits(tokens)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    record_property("folder in", off := error(ours, logits))
    assert off < TOLERANCE


@pytest.mark.parity
@pytest.mark.skipif(not HAVE_TORCH, reason="needs torch and transformers")
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_greedy_text_is_the_same_for_200_tokens(
    case: reference.Case, tmp_path: Path, record_property: Record
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    longer = {"n_positions" if case.kind in reference.GPT2_KEYS else "max_position_embeddings": 256}
    if case.name == "llama-dynamic":  # whose length changes the frequencies, and is long enough
        longer = {}
    if case.name == "phi3-short":  # so that the text does
        longer["original_max_position_embeddings"] = 256
    case = case._replace(config={**case.config, **longer}, T=8)
    prompt = reference.batches(case)[0, 0, :8].astype(np.int32)
    with make_model(case._replace(B=1, T=208)) as model:
        model.save(tmp_path / "model")
        session = model.session(1, 208)
        tokens = prompt.tolist()
        logits = session.decode(prompt)
        for _ in range(200):
            tokens.append(int(np.argmax(logits)))
            logits = session.decode(np.array(tokens[-1:], np.int32))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        if case.name in GENERATED:
            expected = theirs.generate(
                torch.from_numpy(prompt[None]).long(), do_sample=False, max_new_tokens=200,
                min_new_tokens=200, pad_token_id=0,
            )[0].tolist()  # fmt: skip
        else:  # the best token after each prefix of ours
            best = theirs(torch.tensor([tokens[:-1]])).logits[0].argmax(-1)
            expected = [*prompt.tolist(), *best[len(prompt) - 1 :].tolist()]
    assert len(tokens) == len(prompt) + 200
    assert tokens == expected
    record_property("greedy", "same")


@pytest.mark.parity
@pytest.mark.skipif(not HAVE_TORCH, reason="needs torch and transformers")
@pytest.mark.parametrize(
    "case", [case for case in ALL if case.name not in NO_GGUF], ids=lambda case: case.name
)
def test_a_gguf_file_is_the_model_here_and_in_transformers(
    case: reference.Case, tmp_path: Path, record_property: Record
) -> None:
    """Its reader knows the order of rows of each family. It lacks keys, so it gets the config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = reference.batches(case)[0].astype(np.int32)[:, :-1]
    with make_model(case) as model:
        model.save(tmp_path / "model")
        ours = model.logits(tokens)
    source = Checkpoint(tmp_path / "model")
    export_model(source, "gguf", tmp_path / "m.gguf", weights_only=True)
    with Model.load(tmp_path / "m.gguf", max_batch=case.B, max_seq=case.T) as model:
        record_property("GGUF in", off := error(model.logits(tokens), ours))
        assert off == 0
    if case.name in NO_READER:
        return
    config = AutoConfig.from_pretrained(tmp_path / "model")
    if case.kind == "mistral":  # GGUF files have it as a llama
        config.model_type = "llama"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config)
    with torch.no_grad():
        logits = theirs.eval()(torch.from_numpy(tokens).long()).logits.numpy()
    record_property("GGUF out", off := error(logits, ours))
    assert off < TOLERANCE
