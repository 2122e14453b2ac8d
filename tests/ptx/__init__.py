"""A functional machine for PTX: it executes what Triton and nvcc compiled, on the CPU, and watches for faults.

    from tests import ptx

    with ptx.device(arch=80):
        out, lse = attention(q, k, v, None, 0.3)  # of cellattn.kernels, on CPU tensors

Values are those of the instructions' definitions; where the hardware may choose (the order of a matrix product's sum, the
last bits of an approximate function) they are as exact as float32 allows, so that bits may differ from a GPU's. Faults are
those that compute-sanitizer looks for, and some that it cannot see.
"""

from .device import Device, device
from .machine import Fault
from .parser import PtxError

__all__ = ["Device", "Fault", "PtxError", "device"]
