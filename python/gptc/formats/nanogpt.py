"""nanoGPT's ckpt.pt (https://github.com/karpathy/nanoGPT), through PyTorch where it is installed.

The file is a pickle. gptc unpickles nothing: torch.load with weights_only=True builds tensors and
plain values only, and runs no code from the file.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from gptc.errors import GptcError
from gptc.formats import family_names, hf, layout
from gptc.formats.format import Format
from gptc.formats.layout import Naming, Part, Placement
from gptc.formats.model_file import ModelFile, checked, gpt2_values
from gptc.formats.pickled import PickledTensors, load
from gptc.tokenizer import vocabulary
from gptc.tokenizer.base import Tokenizer

_NAMING = Naming(layout.with_leaves(family_names.GPT2))
_COMPILED = "_orig_mod."  # before each name, when the model had been compiled
_PADDED_GPT2 = 50304  # nanoGPT rounds GPT-2's vocabulary up to a multiple of 64


class NanogptModel(ModelFile):
    """A ckpt.pt."""

    format = "nanogpt"
    notes = (
        "nanoGPT computes GELU exactly, gptc by GPT-2's tanh formula: logits differ by some 1e-3",
    )

    def __init__(self, path: Path) -> None:
        """GptcError when PyTorch is missing or refuses the file, or it is not such a checkpoint."""
        self.path = path
        saved = load(path)
        arguments, weights = saved.get("model_args"), saved.get("model")
        if not isinstance(arguments, dict) or not isinstance(weights, dict):
            raise GptcError(f"{path} lacks model_args and model: it is not a checkpoint of nanoGPT")
        named = {
            n.removeprefix(_COMPILED) if isinstance(n, str) else n: t for n, t in weights.items()
        }
        self._tensors = PickledTensors(path, named)
        names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")
        sizes = {name: arguments.get(name) for name in names}
        if not isinstance(sizes["n_embd"], int):
            raise GptcError(f"{path}: model_args: n_embd is {sizes['n_embd']!r}")
        self.config = checked(gpt2_values(sizes), f"{path}: model_args")

    @property
    def tensors(self) -> PickledTensors:
        return self._tensors

    def parts(self) -> list[Part]:
        return layout.parts(self.config, _NAMING)

    @cached_property
    def placement(self) -> Placement:
        # The head is the embedding; older files carry the mask of attention.
        def ignored(name: str) -> bool:
            return name == hf.HEAD or name.endswith(".attn.bias")

        where, embedding, aliases = str(self.path), "transformer.wte.weight", {}
        if hf.HEAD in self.tensors.shapes:
            if embedding not in self.tensors.shapes:
                aliases[embedding] = hf.HEAD
            elif not self.tensors.same(embedding, hf.HEAD):
                raise GptcError(
                    f"{where}: {hf.HEAD} differs from {embedding}, and nanoGPT's are one matrix"
                )
        return Placement(self.config, self.parts(), self.tensors, where, aliases, ignored)

    def tokenizer(self) -> Tokenizer:
        """GPT-2's for a vocabulary of its size; nanoGPT keeps any other in a pickle."""
        if self.config.vocab_size in (vocabulary.GPT2_SIZE, _PADDED_GPT2):
            return vocabulary.gpt2(self.path.parent)
        return super().tokenizer()


FORMAT = Format(
    NanogptModel.format,
    "nanoGPT's ckpt.pt",
    # A zip archive, or the pickle that PyTorch wrote before 1.6.
    detect=lambda path, begin: begin.startswith((b"PK\x03\x04", b"\x80\x02")),
    open=NanogptModel,
)
