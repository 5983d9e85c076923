"""Other programs that decode and read prompts, each with the model of `gptc bench infer` loaded.

A method returns seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gptc.engine.model import Model
from gptc.errors import GptcError
from gptc.files.words import pip_install

BEGIN = 64  # tokens that a sequence holds when its decoding is timed


class Contender(Protocol):
    """A program with the model loaded. Each method returns seconds."""

    name: str

    def decode(self, n_seq: int, steps: int) -> float:
        """A token more for each of n_seq sequences, `steps` times."""
        ...

    def prefill(self, n: int) -> float:
        """A prompt of n tokens, alone."""
        ...


class LlamaCpp:
    """llama.cpp, through llama-cpp-python, with our GGUF file of the model."""

    def __init__(self, file: Path, dtype: str, threads: int, n_ctx: int) -> None:
        from llama_cpp import Llama

        self.name = f"llama.cpp {dtype}"
        self._llama = Llama(
            str(file), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def decode(self, n_seq: int, steps: int) -> float:
        """One sequence; its Python package has no way to more."""
        if n_seq > 1:
            return float("nan")
        self._llama.reset()
        self._llama.eval(list(range(BEGIN)))
        begin = time.perf_counter()
        for _ in range(steps):
            self._llama.eval([5])
        return time.perf_counter() - begin

    def prefill(self, n: int) -> float:
        self._llama.reset()
        begin = time.perf_counter()
        self._llama.eval([i % 1000 for i in range(n)])
        return time.perf_counter() - begin


class Transformers:
    """GPT-2 or Llama of transformers, from our folder of the model."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.name = f"transformers {dtype}"
        self._torch = torch
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        loader: Any = AutoModelForCausalLM
        self._model = loader.from_pretrained(folder, dtype=kind).eval()

    def _run(self, tokens: Any, past: Any) -> Any:
        with self._torch.no_grad():
            return self._model(tokens, past_key_values=past, use_cache=True).past_key_values

    def decode(self, n_seq: int, steps: int) -> float:
        past = self._run(self._torch.arange(BEGIN).repeat(n_seq, 1), None)
        token = self._torch.full((n_seq, 1), 5)
        begin = time.perf_counter()
        for _ in range(steps):
            past = self._run(token, past)
        return time.perf_counter() - begin

    def prefill(self, n: int) -> float:
        begin = time.perf_counter()
        self._run(self._torch.arange(n).remainder(1000)[None], None)
        return time.perf_counter() - begin


class Writer(ABC):
    """A program that continues prompts greedily, in one call."""

    name: str
    _calls = 0

    @abstractmethod
    def write(self, prompts: npt.NDArray[np.int64], n: int) -> float:
        """Continues each prompt, (n_seq, n_prompt), by n tokens.

        Returns the seconds from the first of these to the last.
        """

    def _prompts(self, n_seq: int, n: int) -> npt.NDArray[np.int64]:
        """Others in each call: some programs keep what they read last."""
        self._calls += 1
        return np.tile(1 + (np.arange(n, dtype=np.int64) + self._calls) % 1000, (n_seq, 1))

    def decode(self, n_seq: int, steps: int) -> float:
        return self.write(self._prompts(n_seq, BEGIN), steps + 1)

    def prefill(self, n: int) -> float:
        prompts, begin = self._prompts(1, n), time.perf_counter()
        self.write(prompts, 1)
        return time.perf_counter() - begin


class CTranslate2(Writer):
    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import ctranslate2

        self.name = f"CTranslate2 {dtype}"
        kind = {"fp32": "float32"}.get(dtype, dtype)
        self._generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
        )

    def write(self, prompts: npt.NDArray[np.int64], n: int) -> float:
        times: list[float] = []
        self._generator.generate_batch(
            [[_name(id) for id in prompt] for prompt in prompts.tolist()],
            max_length=n, min_length=n, sampling_topk=1, include_prompt_in_result=False,
            callback=lambda step: times.append(time.perf_counter()),
        )  # fmt: skip
        return times[-1] - times[0]


class OpenVino(Writer):
    """OpenVINO GenAI; weights of int8 are multiplied in bf16, as it does where a CPU can."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self.name = f"OpenVINO {dtype}"
        self._tensor, self._genai = openvino.Tensor, openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(
            str(folder), "CPU", INFERENCE_NUM_THREADS=threads,
            INFERENCE_PRECISION_HINT="f32" if dtype == "fp32" else "bf16",
        )  # fmt: skip

    def write(self, prompts: npt.NDArray[np.int64], n: int) -> float:
        how = self._genai.GenerationConfig(
            max_new_tokens=n, min_new_tokens=n, ignore_eos=True, eos_token_id=0, stop_token_ids={0}
        )
        tokens, mask = self._tensor(prompts), self._tensor(np.ones_like(prompts))
        done = self._pipeline.generate(self._genai.TokenizedInputs(tokens, mask), how)
        times: list[float] = done.perf_metrics.raw_metrics.m_new_token_times  # ms
        return (times[-1] - times[0]) / 1000


class OnnxRuntime:
    """ONNX Runtime GenAI."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import onnxruntime_genai

        self.name = f"ONNX Runtime {dtype}"
        self._genai = onnxruntime_genai
        file = folder / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        file.write_text(json.dumps(config))
        self._model = onnxruntime_genai.Model(str(folder))

    def _started(self, n_seq: int, n_prompt: int, n: int) -> Any:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(
            max_length=n_prompt + n, min_length=n_prompt + n, batch_size=n_seq, do_sample=False
        )
        return self._genai.Generator(self._model, params)

    def _read(self, generator: Any, n_seq: int, n_prompt: int) -> None:
        prompt = 1 + np.arange(n_prompt, dtype=np.int32) % 1000
        generator.append_tokens(np.tile(prompt, (n_seq, 1)))
        generator.generate_next_token()

    def decode(self, n_seq: int, steps: int) -> float:
        generator = self._started(n_seq, BEGIN, steps + 2)
        self._read(generator, n_seq, BEGIN)
        begin = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return time.perf_counter() - begin

    def prefill(self, n: int) -> float:
        generator = self._started(1, n, 2)
        begin = time.perf_counter()
        self._read(generator, 1, n)
        return time.perf_counter() - begin


# ---- the model, as each program wants it ----


@dataclass(frozen=True)
class _Folders:
    """Where the model is stored: `model` as gptc writes it, `named` with names of tokens too."""

    model: Path
    named: Path
    threads: int
    n_ctx: int

    def place(self, name: str) -> Path:
        """Where another form of the model goes."""
        return self.model.parent / name


def _convert(module: str, *options: object) -> None:
    """Runs a converter, which is a module."""
    command = [sys.executable, "-m", module, *map(str, options)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        said = (ran.stderr.strip() or ran.stdout.strip() or "no message").splitlines()[-1]
        raise GptcError(f"{module} does not convert the model: {said}")


def _llama_cpp(at: _Folders) -> list[Contender]:
    from gptc.checkpoint.find import open_checkpoint
    from gptc.convert.export_model import export_model

    source, found = open_checkpoint(at.model), list[Contender]()
    for dtype in ("fp32", "bf16", "q8_0"):
        file = at.place(f"{dtype}.gguf")
        export_model(source, "gguf", file, dtype=dtype)
        found.append(LlamaCpp(file, dtype, at.threads, at.n_ctx))
    return found


def _transformers(at: _Folders) -> list[Contender]:
    return [Transformers(at.model, dtype, at.threads) for dtype in ("fp32", "bf16")]


def _ctranslate2(at: _Folders) -> list[Contender]:
    out = at.place("ctranslate2")
    _convert("ctranslate2.converters.transformers", "--model", at.named, "--output_dir", out)
    return [CTranslate2(out, dtype, at.threads) for dtype in ("fp32", "int8")]


def _openvino(at: _Folders) -> list[Contender]:
    fp32, int8 = at.place("openvino-fp32"), at.place("openvino-int8")
    for dtype, out in (("fp32", fp32), ("int8", int8)):
        _convert(
            "optimum.commands.optimum_cli", "export", "openvino", "--model", at.named,
            "--task", "text-generation-with-past", "--weight-format", dtype, out,
        )  # fmt: skip
    places = {"fp32": fp32, "bf16": fp32, "int8": int8}
    return [OpenVino(folder, dtype, at.threads) for dtype, folder in places.items()]


def _onnxruntime(at: _Folders) -> list[Contender]:
    found: list[Contender] = []
    for dtype in ("fp32", "int4"):
        out = at.place(f"onnx-{dtype}")
        _convert(
            "onnxruntime_genai.models.builder", "-i", at.named, "-o", out, "-p", dtype,
            "-e", "cpu", "-c", at.place("onnx-cache"),
        )  # fmt: skip
        found.append(OnnxRuntime(out, dtype, at.threads))
    return found


@dataclass(frozen=True)
class _Rival:
    make: Callable[[_Folders], list[Contender]]
    modules: tuple[str, ...]
    packages: tuple[str, ...]


RIVALS = {
    "llama.cpp": _Rival(_llama_cpp, ("llama_cpp",), ("llama-cpp-python",)),
    "transformers": _Rival(_transformers, ("torch", "transformers"), ("torch", "transformers")),
    "ctranslate2": _Rival(
        _ctranslate2,
        ("ctranslate2", "torch", "transformers"),
        ("ctranslate2", "torch", "transformers"),
    ),
    "openvino": _Rival(
        _openvino, ("openvino_genai", "optimum.intel"), ("openvino-genai", "optimum-intel")
    ),
    "onnxruntime": _Rival(
        _onnxruntime,
        ("onnxruntime_genai", "onnx_ir", "torch", "transformers"),
        ("onnxruntime-genai", "onnx-ir", "torch", "transformers"),
    ),
}


def rivals(names: tuple[str, ...], weights: Model, folder: Path) -> list[Contender]:
    """The named programs with the model loaded; GptcError where one is not installed."""
    from gptc.checkpoint.writer import save

    for name in names:
        if not all(map(_is_installed, RIVALS[name].modules)):
            packages = pip_install(*RIVALS[name].packages)
            raise GptcError(f"{name} is not installed; try: {packages}")
    if not names:
        return []
    at = _Folders(folder / "model", folder / "named", weights.threads, weights.config.block_size)
    save(at.model, weights)
    name_tokens(at.model, at.named)
    return [contender for name in names for contender in RIVALS[name].make(at)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package that the module is in
        return False


def _name(id: int) -> str:
    return f"t{id}"


def name_tokens(model: Path, out: Path) -> None:
    """The checkpoint `model` with a word for each token: converters ask for a tokenizer."""
    out.mkdir()
    (out / "model.safetensors").symlink_to((model / "model.safetensors").resolve())
    config = json.loads((model / "config.json").read_text())
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    words = {_name(id): id for id in range(config["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": _name(0)},
    }
    marks = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _name(0))
    marks["tokenizer_class"] = "PreTrainedTokenizerFast"
    files = {"config": config, "tokenizer": tokenizer, "tokenizer_config": marks}
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content))
