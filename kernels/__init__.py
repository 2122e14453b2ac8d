"""Triton device code and its launchers, installed as `cellattn.kernels`: what the operators run for CUDA tensors."""
