"""`python -m gptc` is the command line."""

from gptc.cli import main

if __name__ == "__main__":
    main()
