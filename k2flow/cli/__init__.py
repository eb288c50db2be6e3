"""The command line.

`commands` and `groups` declare every command: its arguments, options and help. They import no slow library, so that
help answers at once. A command imports the module that does its work when it runs.
"""
