"""The program: `gptc`, and `python -m gptc`."""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line. It is imported here, so that Ctrl-C meanwhile is no traceback."""
    try:
        from gptc.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
