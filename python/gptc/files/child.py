"""A program that runs another program of gptc within limits, in a process of `bounded`.

    python -I -S child.py PROGRAM SYS_PATH SECONDS BYTES [ARGUMENT...] < DATA

It imports nothing of gptc, to start soon.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

program, path, seconds, n_bytes, *rest = sys.argv[1:]
sys.path[:] = json.loads(path)
sys.argv[:] = [program, *rest]
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
for limited in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
    resource.setrlimit(limited, (int(n_bytes), int(n_bytes)))
exec(compile(Path(program).read_text("utf-8"), program, "exec"), {"__name__": "__main__"})
