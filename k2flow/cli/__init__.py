"""The command line.

`commands` declares every command: its arguments, options and help. It imports no slow library, so that help answers at
once. A command imports the module that does its work when it runs.
"""
