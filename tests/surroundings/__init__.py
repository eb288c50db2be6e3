"""What k2flow has around it in production, each a real one on this machine: started for tests and ended by them."""
