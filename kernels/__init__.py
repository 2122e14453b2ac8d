"""Triton device code and its launchers, installed as `cellattn.kernels`. The operators run on the CPU alone so far."""
