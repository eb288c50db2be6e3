"""Runs the Bytewax processes of flows: starts them, restarts them after a crash, and passes signals on.

Each exchange has its own processes and is supervised independently: a failure, wait or restart of one delays no other.

plan        the processes of an exchange that run on this host, and their addresses
flow        one exchange's processes: start, end, restart with back-off
failure     why the processes of a flow ended, from their exit codes and standard error
counts      the processes' metrics, added up
supervise   the flows of several exchanges, their signals and the metrics endpoint
"""
