"""The command line.

`commands` declares every command: its arguments, options and help. The work of a command is in the module of its name,
which is imported when the command runs. So help needs typer alone, and answers at once.
"""
