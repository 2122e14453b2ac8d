"""The chips of the model: sizes and rates from their vendor's documents.

Rates of instructions are those of the table "Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide,
in results a clock and multiprocessor. Products of the matrix units, clocks and bandwidths are of the white papers and data
sheets of the A100 (2020), the A40 (2020), the RTX A5000 (2021), the RTX 6000 Ada (2023) and the H100 SXM5 (2022): what a
matrix unit does a clock is the peak without sparsity over multiprocessors and boost clock, with 16-bit inputs and float32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULERS = 4  # of a multiprocessor: each issues one instruction of a warp a clock


@dataclass(frozen=True)
class Chip:
    name: str
    arch: int
    multiprocessors: int
    clock: float  # Hz, boost
    dram: float  # bytes a second
    shared: int  # bytes of a multiprocessor
    warps: int  # of a multiprocessor, at most
    ctas: int  # likewise
    fp32: int  # results a clock and multiprocessor: additions, products and multiply-adds in float32
    tensor: int  # multiply-adds a clock and multiprocessor of the matrix units
    integer: int = 64  # results a clock and multiprocessor: 32-bit additions, comparisons, shifts, logic; and multiply-adds
    special: int = 16  # results a clock and multiprocessor: exponentials, logarithms, reciprocals
    registers: int = 65536  # of a multiprocessor

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """CTAs that a multiprocessor holds at once; registers are dealt out in 256 a warp, 1 KiB of each is the system's."""
        by_registers = self.registers // (-(-registers * 32 // 256) * 256 * warps)
        by_shared = self.shared // (shared + 1024)
        return max(1, min(by_registers, by_shared, self.warps // warps, self.ctas))


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 80, 108, 1.410e9, 2.039e12, 164 << 10, 64, 32, fp32=64, tensor=1024),
        Chip("A40", 86, 84, 1.740e9, 0.696e12, 100 << 10, 48, 16, fp32=128, tensor=512),
        Chip("RTX 6000 Ada", 89, 142, 2.505e9, 0.960e12, 100 << 10, 48, 24, fp32=128, tensor=512),
        Chip("A5000", 86, 64, 1.695e9, 0.768e12, 100 << 10, 48, 16, fp32=128, tensor=512),  # an anchor alone
        Chip("H100 SXM", 90, 132, 1.830e9, 3.350e12, 228 << 10, 64, 32, fp32=128, tensor=2048),
    )
}
