"""`python -m k2flow`."""

from k2flow.cli.main import main

main()
