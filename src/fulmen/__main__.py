"""`python -m fulmen` is the `fulmen` command, so that torchrun can start it."""

from fulmen.cli import main

if __name__ == "__main__":
    main()
