"""Several processes on one global batch, as torchrun starts them: who takes what, what is added up, and how they end.

One process is the case of one rank: everything here then does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@contextmanager
def distributed(device: str | None = None, *, timeout: float = 300.0) -> Iterator[torch.device]:
    """Join the other ranks if torchrun started this process (RANK is set), for the time of the block.

    Args:
        device: "cpu" or "cuda"; cuda where there is one, if None. Each rank takes the GPU of its local rank.
        timeout: seconds after which a rank that waits for another gives up with an error.

    Yields:
        This rank's device.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        yield torch.device(kind)
        return
    here = torch.device(kind)
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    yield here
    dist.destroy_process_group()  # not after an error: the others may be gone


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


class Share(NamedTuple):
    """Samples that one pass computes, and the share of the global batch that they are."""

    samples: Tensor
    weight: float


def shares(samples: Tensor, *, passes: int = 1) -> list[Share]:
    """This rank's part of a global batch, in at most `passes` passes; over all ranks the weights add to 1.

    A rank for which no sample is left takes another's at weight 0, so that all ranks have the same gradients to add up.
    """
    parts = samples.tensor_split(world_size() * passes)[rank() * passes : (rank() + 1) * passes]
    mine = [Share(part, len(part) / len(samples)) for part in parts if len(part)]
    return mine or [Share(samples[:1], 0.0)]


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in one exchange a dtype; the same bits on every rank.

    Raises:
        RuntimeError: another rank has ended, or did not answer in time.
    """
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        with _others_answer():
            dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def from_main(f: Callable[[], T]) -> T:
    """f() of the main process, for all; it is called there alone."""
    if world_size() == 1:
        return f()
    value: list[T | None] = [f() if is_main() else None]
    with _others_answer():
        dist.broadcast_object_list(value, src=0)
    return value[0]  # type: ignore[return-value]


@contextmanager
def _others_answer() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank()} of {world_size()}: another rank has ended or did not answer in time; "
            "start all ranks again, and the run goes on from its last checkpoint"
        ) from error
