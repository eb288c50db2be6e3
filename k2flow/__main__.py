"""`k2flow`, also `python -m k2flow`."""

from k2flow.cli.commands import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
