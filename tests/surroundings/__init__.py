"""The services around k2flow in production, each a real one on this machine: tests start and stop them."""
