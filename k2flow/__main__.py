"""`k2flow`, also `python -m k2flow`."""

from k2flow.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
