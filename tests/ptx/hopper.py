"""sm_90: products of a warpgroup out of shared memory, and their fences."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import numbers
from .collectives import accumulators, fragments, halves
from .decode import Decoding, Get, Run, nothing, opcode
from .machine import Machine, Mask, Product
from .memory import AccessError
from .parser import Register, Vector

Array = Any


@opcode("fence")
def fence(i: Decoding) -> Run:
    """Synchronization and communication: fence.proxy.async shows wgmma what others wrote."""
    if i.flag("proxy"):
        i.require("async")
        i.choice("shared::cta", "shared::cluster", "global", default="")
        i.finish(0)
        return lambda m, mask: m.shared.fence(m.thread if mask is None else np.flatnonzero(mask))
    i.choice("acq_rel", "sc", "acquire", "release")
    i.choice("cta", "cluster", "gpu", "sys")
    i.finish(0)
    return nothing


# Bytes of a row of the pattern, by the descriptor's two highest bits ("Matrix descriptor format"); 0: without a swizzle.
_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}


def _decoded(descriptor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Start, leading and stride offsets in bytes, and the swizzle's code."""
    d = descriptor.astype(np.uint64)
    low = np.uint64(0x3FFF)
    start, leading, stride = ((d >> np.uint64(at) & low).astype(np.int64) << 4 for at in (0, 16, 32))
    if (d >> np.uint64(49) & np.uint64(7)).any():
        raise ValueError("a descriptor with a base offset")
    return start, leading, stride, (d >> np.uint64(62)).astype(np.int64)


def matrix_addresses(descriptor: np.ndarray, rows: int, *, by_rows: bool) -> np.ndarray:
    """[n, pieces] addresses of the 16-byte pieces of a matrix [rows, 16] of 16-bit numbers, rows being M or N.

    by_rows ("K-major"): a piece is 8 numbers along k of one row, in order [rows, 2]. A pattern is 8 rows of `swizzle` bytes;
    the stride offset leads from one pattern to the next 8 rows, and the leading offset is not used, as all of k = 16 lies in
    one pattern (without a swizzle a pattern has 16 bytes a row, and it leads to the second 8 of k).
    Otherwise ("MN-major", transposed): a piece is 8 numbers along rows for one k, in order [rows / 8, 16]. A pattern is 8
    values of k, each `swizzle` bytes of rows; the stride offset leads to the next 8 of k, the leading offset to the next rows.
    The swizzle exchanges the 16-byte pieces of a pattern's row by its number: address bits 4 and up with bits 7 and up.
    """
    start, leading, stride, code = _decoded(descriptor)
    if (code != code[0]).any():
        raise ValueError("descriptors with different swizzles")
    width = _SWIZZLES[int(code[0])]
    if by_rows:
        row, piece = np.arange(rows)[:, None], np.arange(2)[None, :]
        if width:
            inside = row % 8 * width + piece * 16
            offset = start[:, None, None] + row // 8 * stride[:, None, None] + inside
        else:
            offset = start[:, None, None] + row // 8 * stride[:, None, None] + row % 8 * 16 + piece * leading[:, None, None]
    else:
        group, k = np.arange(rows // 8)[:, None], np.arange(16)[None, :]
        if width:
            a_row = width // 16  # groups of 8 in a row of the pattern
            inside = k % 8 * width + group % a_row * 16
            offset = start[:, None, None] + group // a_row * leading[:, None, None] + k // 8 * stride[:, None, None] + inside
        else:
            offset = start[:, None, None] + group * stride[:, None, None] + k // 8 * leading[:, None, None] + k % 8 * 16
    offset = offset.reshape(len(start), -1)
    bits = {128: 7, 64: 3, 32: 1, 0: 0}[width]
    return offset ^ ((offset >> 7 & bits) << 4)


@opcode("wgmma")
def wgmma(i: Decoding) -> Run:
    """Asynchronous warpgroup level matrix: fence, mma_async, commit_group and wait_group."""
    if i.flag("fence"):
        i.require("sync", "aligned")
        i.finish(0)
        i.kind = "warp"

        def open_(m: Machine, mask: Mask) -> None:
            m.product_fence[_together(m, mask)] = m.done

        return open_
    if i.flag("commit_group"):
        i.require("sync", "aligned")
        i.finish(0)
        i.kind = "warp"

        def commit(m: Machine, mask: Mask) -> None:
            m.product_group[_together(m, mask)] += 1

        return commit
    if i.flag("wait_group"):
        i.require("sync", "aligned")
        keep = i.constant(0)
        i.finish(1)
        i.kind = "warp"

        def wait(m: Machine, mask: Mask) -> None:
            ctas = _together(m, mask)
            for product in m.products:
                done = product.ctas & ctas & (product.group < m.product_group - keep)
                for granules, thread in product.reads:
                    mine = done[thread // m.threads]
                    m.shared.end_async_read(granules[mine], thread[mine])
                product.ctas &= ~done
            m.products = [product for product in m.products if product.ctas.any()]

        return wait
    return _product(i)


def _together(m: Machine, mask: Mask) -> np.ndarray:
    """bool [CTAs]: those that are at it, each with all its threads, which is how kernels use it; anything else is not known."""
    ctas = m.ctas_at(mask)
    if (np.repeat(ctas, m.threads) != m.full(mask)).any():
        raise m.fault("wgmma by a part of a CTA is not known")
    return ctas


def _product(i: Decoding) -> Run:
    """Asynchronous warpgroup level matrix: D[64, N] = A[64, 16] B[16, N] (+ D), a warp having 16 rows.

    A comes out of registers as for mma, or both out of shared memory as descriptors say. D belongs to the product, and the
    shared bytes are read, until it is waited for.
    """
    i.require("mma_async", "sync", "aligned")
    shape = i.choice(*(f"m64n{n}k16" for n in range(8, 257, 8)))
    n = int(shape[4:-3])
    b_kind, a_kind, d_kind = i.left.pop(), i.left.pop(), i.left.pop()
    if a_kind not in ("bf16", "f16") or a_kind != b_kind or d_kind != "f32":
        raise i.error("these types are not known")
    puts = [i.target(x, 32) for x in i.parts(0)]
    before = [i.source(x, np.float32) for x in i.parts(0)]
    if len(puts) != n // 2:
        raise i.error(f"{n // 2} accumulators are expected")
    from_registers = isinstance(i.operand(1), Vector)
    a = [i.source(x, np.uint32 if from_registers else np.uint64) for x in i.parts(1)]
    b = i.source(2, np.uint64)
    keep = i.source(3, np.bool_)
    if i.constant(4) != 1 or i.constant(5) != 1:
        raise i.error("a negated operand is not known")
    trans_a = 0 if from_registers else i.constant(6)
    trans_b = i.constant(6 if from_registers else 7)
    i.finish(7 if from_registers else 8)
    i.kind = "warp"
    i.program.async_proxy = True
    i.touches_shared(16)
    held = frozenset(x.index for k in (0, 1) for x in i.parts(k) if isinstance(x, Register) and (k == 0 or from_registers))

    def matrix(m: Machine, mask: Mask, get: Get, rows: int, by_rows: bool, product: Product) -> np.ndarray:
        """[warpgroups, rows, 16] float32 as a descriptor says, read by the first thread of each warpgroup."""
        thread = m.thread[::128] if mask is None else m.thread[::128][mask[::128]]
        descriptor = m.wide(get(m))
        if (descriptor.reshape(-1, 128) != descriptor[::128, None]).any():
            raise m.fault("a descriptor that differs within a warpgroup")
        try:
            address = matrix_addresses(descriptor[thread], rows, by_rows=by_rows)
        except ValueError as error:
            raise m.fault(f"{error} is not known") from None
        readers = np.repeat(thread, address.shape[1])
        try:
            data, granules = m.shared.begin_async_read(address.reshape(-1), 16, readers)
        except AccessError as error:
            raise m.access_fault(error, readers) from None
        product.reads.append((granules, readers))
        bits = np.ascontiguousarray(data).view(np.uint16).reshape(len(thread), -1, 8)
        values = numbers.from_bfloat16(bits) if a_kind == "bf16" else numbers.from_float16(bits)
        if by_rows:
            found = values.reshape(len(thread), rows, 16)
        else:
            found = values.reshape(len(thread), rows // 8, 16, 8).transpose(0, 1, 3, 2).reshape(len(thread), rows, 16)
        if mask is None:
            return found
        whole = np.zeros((m.size // 128, rows, 16), np.float32)
        whole[thread // 128] = found
        return whole

    def run(m: Machine, mask: Mask) -> None:
        ctas = _together(m, mask)
        if m.threads % 128:
            raise m.fault("wgmma needs whole warpgroups")
        m.check_product_fence(held, ctas)
        product = Product(ctas, m.product_group.copy(), held, [])
        right = matrix(m, mask, b, n, not trans_b, product)  # [warpgroups, n, 16]
        if from_registers:
            blocks = [halves(m, get, a_kind) for get in a]
            left = np.concatenate([np.concatenate(blocks[0:2], 1), np.concatenate(blocks[2:4], 1)], 2)
            left = left.reshape(-1, 64, 16)
        else:
            left = matrix(m, mask, a[0], 64, not trans_a, product)
        d = np.matmul(left, right.transpose(0, 2, 1), dtype=np.float64)  # [warpgroups, 64, n]
        scale = keep(m)
        if np.ndim(scale):
            scale = scale[m.full(mask)]
        if np.ndim(scale) and (scale != scale[0]).any():
            raise m.fault("scale-d that differs between threads is not known")
        if np.all(scale):
            d = d + accumulators(m, before).reshape(-1, 64, n)
        for put, column in zip(puts, fragments(d.astype(np.float32).reshape(-1, 16, n)), strict=True):
            put(m, column, mask)
        m.products.append(product)

    return run
