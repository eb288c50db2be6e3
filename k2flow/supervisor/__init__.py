"""Runs the Bytewax processes of flows: starts them, restarts them after a crash, and passes signals on.

Each flow has its own processes and is supervised independently: a failure, wait or restart of one delays no other.
`supervise` runs several flows, with their signals and one metrics endpoint. `flow` starts, ends and
restarts the processes of one. `plan` picks those that run on this host. `failure` finds why they ended.
"""
