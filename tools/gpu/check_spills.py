"""Reads the log of a build with -DGPTC_PTXAS_INFO=ON, and fails if a hot kernel spills.

    cmake -S . -B build/cuda -G Ninja -DGPTC_CUDA=ON -DGPTC_PTXAS_INFO=ON
    cmake --build build/cuda | tee build.log; python3 tools/gpu/check_spills.py build.log

Registers spill to a thread's stack, in slow memory, if there are too few; arrays with run-time
indices go there too. A kernel of the files below may do neither. Nor may ptxas wait after each
product of a warpgroup, as it does, with a remark, where registers are short.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

HOT = ("attention_bf16", "small_bf16", "vector_attention_bf16")
# Of files that are compiled as one (sources.cmake): if a file leaves it, HOT has to name it.
HOT_KERNELS = (
    "attention_decode_kernel",
    "classifier_kernel",
    "expert_product_kernel",
    "few_expert_kernel",
    "few_norm_forward_kernel",
    "few_product_kernel",
    "residual_norm_backward_kernel",
    "residual_norm_forward_kernel",
    "rows_product_kernel",
    "wide_norm_backward_kernel",
)


class Kernel(NamedTuple):
    """One kernel compiled for one architecture."""

    file: str
    name: str
    arch: str
    stack_bytes: int
    spill_bytes: int
    registers: int


def kernels(log: str) -> list[Kernel]:
    """Every kernel in a build log, in order."""
    found, file, name, arch, stack, spill = [], "", "", "", 0, 0
    for line in log.splitlines():
        if m := re.search(r"Building CUDA object .*?(\w+)\.dir/.*?(\w+)\.cu\.o", line):
            file = m[2] if m[1].endswith("bf16") or m[1].endswith("device") else f"{m[2]} (fp32)"
        elif m := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, arch = readable(m[1]), m[2]
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) byt", line):
            stack, spill = int(m[1]), int(m[2]) + int(m[3])
        elif name and (m := re.search(r"Used (\d+) registers", line)):
            found.append(Kernel(file, name, arch, stack, spill, int(m[1])))
            name = ""
    return found


def readable(mangled: str) -> str:
    """A short form of a mangled name, such as norm_kernel<8>."""
    name = re.search(r"\d([a-z]\w*?_kernel)(I\w*?E(?=v))?", mangled)
    if not name:
        return mangled
    numbers = ", ".join(re.findall(r"L[a-z](\d+)E", name[2] or ""))
    return f"{name[1]}<{numbers}>" if numbers else name[1]


def main() -> int:
    """Prints the hot kernels; returns 1 if one spills, or if the log lacks a file or kernel."""
    if len(sys.argv) != 2:
        print("usage: python3 tools/gpu/check_spills.py BUILD_LOG", file=sys.stderr)
        return 2
    log = Path(sys.argv[1]).read_text("utf-8")
    hot = [k for k in kernels(log) if k.file in HOT]
    waits = re.findall(r"wgmma.mma_async instructions are serialized.*function '(\w+)'", log)
    found = {k.file for k in hot} | {k.name.partition("<")[0] for k in hot}
    missing = sorted({*HOT, *HOT_KERNELS} - found)
    for k in hot:
        spills = k.stack_bytes or k.spill_bytes
        print(
            f"{'SPILLS' if spills else 'ok':7}{k.arch:9}{k.file}: {k.name}, {k.registers} registers"
            + (f", {k.stack_bytes} B of stack, {k.spill_bytes} B spilled" if spills else "")
        )
    for name in waits:
        print(f"WAITS  {readable(name)}: its warpgroup's products run one by one")
    if missing:
        print(f"the log has none of {', '.join(missing)}: build from scratch, with ptxas -v")
    n = sum(bool(k.stack_bytes or k.spill_bytes) for k in hot)
    print(f"{len(hot)} hot kernels, {n} of them spill")
    return 1 if n or waits or missing else 0


if __name__ == "__main__":
    sys.exit(main())
