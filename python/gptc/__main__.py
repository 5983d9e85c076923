"""Entry point of `gptc` and of `python -m gptc`."""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line. The import is here so that Ctrl-C during it prints no traceback."""
    try:
        from gptc.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
