"""A GPT-2 as OpenAI published it, of any size: a TensorFlow checkpoint and its settings."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from gptc.formats import openai_tf
from gptc.formats.model_file import ModelFile
from mutate import varint


def write_openai(folder: Path, source: ModelFile) -> None:
    """Writes a GPT-2 of any size as OpenAI published it, as a TensorFlow checkpoint."""
    folder.mkdir()
    config = source.config
    hparams = {"n_vocab": config.vocab_size, "n_ctx": config.block_size, "n_embd": config.n_embd}
    hparams |= {"n_head": config.n_head, "n_layer": config.n_layer}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    leaves = {"weight": "g", "bias": "b"}
    places = {"attn.qkv": "attn/c_attn", "attn.proj": "attn/c_proj", "mlp.fc": "mlp/c_fc"}
    places |= {"mlp.proj": "mlp/c_proj", "norm_1": "ln_1", "norm_2": "ln_2", "norm_f": "ln_f"}
    tensors = {}
    for ours, shape, _ in config.parameters():
        *layer, stem, leaf = ours.split(".") if "norm" in ours else ours.rsplit(".", 1)
        values = source.read(ours)
        if ours.startswith("h."):
            layer, stem = ours.split(".")[1:2], ".".join(ours.split(".")[2:-1])
        name = places.get(stem, stem)
        last = leaves[leaf] if "ln_" in name else leaf[0]
        if ours.startswith("h.") and len(shape) == 2:
            values = np.ascontiguousarray(values.T)[None]
        path = f"h{layer[0]}/{name}/{last}" if layer else f"{name}/{last}"
        tensors[f"model/{path if stem not in ('wte', 'wpe') else stem}"] = values
    write_bundle(folder / "model.ckpt", tensors)


def write_bundle(prefix: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a TensorFlow checkpoint: a file of tensors, and a LevelDB table that indexes them."""
    rows = [(b"", b"\x08\x01\x1a\x02\x08\x01")]  # one file; version 1
    data = b""
    for name in sorted(tensors):
        values = tensors[name].astype("<f4")
        dims = b"".join(_sized(2, b"\x08" + varint(n)) for n in values.shape)
        crc = openai_tf._mask(openai_tf.crc32c(values.reshape(-1).view(np.uint8)))
        entry = b"\x08\x01" + _sized(2, dims) + b"\x20" + varint(len(data))
        entry += b"\x28" + varint(values.nbytes) + b"\x35" + struct.pack("<I", crc)
        rows.append((name.encode(), entry))
        data += values.tobytes()
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    out = bytearray()

    def add(block: list[tuple[bytes, bytes]]) -> bytes:
        """Writes a block and returns its handle."""
        raw, restarts, previous = bytearray(), [], b""
        for i, (key, value) in enumerate(block):
            if i % 16 == 0:
                restarts.append(len(raw))
                previous = b""
            shared = _common(previous, key)
            raw += varint(shared) + varint(len(key) - shared) + varint(len(value))
            raw += key[shared:] + value
            previous = key
        raw += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
        handle = varint(len(out)) + varint(len(raw))
        crc = openai_tf._mask(openai_tf.crc32c(np.frombuffer(bytes(raw) + b"\0", np.uint8)))
        out.extend(bytes(raw) + b"\0" + struct.pack("<I", crc))
        return handle

    blocks = [rows[i : i + 20] for i in range(0, len(rows), 20)]
    handles = [(block[-1][0], add(block)) for block in blocks]
    metaindex = add([(b"", b"")])
    footer = metaindex + add(handles)
    out += footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    prefix.with_name(f"{prefix.name}.index").write_bytes(out)


def _common(a: bytes, b: bytes) -> int:
    """Length of the common prefix of two keys."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _sized(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + varint(len(data)) + data
