"""Rows of a graph, drawn without replacement."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._check import describe, describe_number, require, unboxed, values_visible
from ..graph import MultiGraph


def sample_rows(graph: MultiGraph, relation: str, num_rows: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw genes uniformly, without replacement, among those with a valid edge in a relation.

    Args:
        num_rows: how many, at most `graph.num_rows_with_edges(relation)`.
        generator: a `torch.Generator` on the graph's device, the default one if None. Under `torch.utils.checkpoint`, which
            restores the default generator alone, the recomputation draws the same with either (as long as it keeps its
            preserve_rng_state=True). Two forwards that wait for their backward must not begin with the default generator in the
            same state: a warning says so.

    Returns:
        int64 [num_rows], ascending, on the graph's device. The sum of a loss over these rows times
        num_rows_with_edges / num_rows estimates the sum over all rows without bias.

    Raises:
        ValueError: if fewer rows have an edge than were asked for.
    """
    if not isinstance(graph, MultiGraph):
        raise TypeError(f"graph: expected a MultiGraph, got {describe(graph)}")
    graph.require_unwritten()
    first = graph.relation_id(relation) * graph.num_nodes
    available = graph.num_rows_with_edges(relation)
    number = unboxed(num_rows)
    valid = isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= available
    require(
        valid,
        lambda: (
            f"num_rows: expected an int in [0, {available}], the rows of {relation!r} with an edge, "
            f"got {describe_number(num_rows)}"
        ),
    )
    check_generator(generator)
    has_edge = graph.inv_mass.narrow(0, first, graph.num_nodes) > 0
    # The smallest of independent uniform keys are a uniform draw, of a size that is known without looking at the data.
    key = torch.empty(graph.num_nodes, dtype=torch.float64, device=graph.device)
    key.uniform_(generator=generator_of_draw(generator))
    return key.masked_fill(~has_edge, 2.0).topk(number, largest=False).indices.sort().values


def check_generator(generator: Any) -> None:
    """Check an optional `torch.Generator`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {describe(generator)}")


_MAX_TICKETS = 1024  # draws that are remembered: those of a forward, where all of it is checkpointed


class _Draw(NamedTuple):
    """What is remembered of a draw."""

    state: Tensor  # of the generator, before it
    is_only: bool  # no other draw has the ticket and waits for its recomputation
    was_repeated: bool = False


_draws: OrderedDict[tuple[int, int], _Draw] = OrderedDict()  # by ticket and generator


def generator_of_draw(generator: torch.Generator | None) -> torch.Generator | None:
    """The generator to draw from: `generator`, or where checkpointing repeats a draw, a copy in the state of the first time.

    Checkpointing brings back the state of PyTorch's default generator before it computes a part of the forward again, of no
    other. So each draw from another generator takes a ticket, a number from the default one, and its state is kept under that:
    in the recomputation, which goes on inside a backward, the same ticket comes out and finds it.
    """
    if generator is None or torch.compiler.is_compiling() or generator is torch.default_generator:
        return generator
    ticket = torch.empty((), dtype=torch.int64, device="cpu").random_()
    if not values_visible(ticket) or (generator.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return generator
    key = int(ticket), id(generator)
    kept = _draws.get(key)
    if torch._C._current_graph_task_id() >= 0 and kept is not None:
        if not kept.is_only:
            warnings.warn(
                "generator: activation checkpointing repeats one of two draws that were made with the default generator in the "
                "same state, and cannot tell which: the gradient may be that of the other; seed the default generator "
                "(torch.manual_seed, torch.random.fork_rng) once for all forwards that wait for a backward",
                stacklevel=2,
            )
        _draws[key] = kept._replace(was_repeated=True)
        return torch.Generator(generator.device).set_state(kept.state)
    state = generator.get_state()
    is_only = kept is None or kept.was_repeated or (kept.is_only and torch.equal(kept.state, state))
    _draws[key] = _Draw(state, is_only)
    while len(_draws) > _MAX_TICKETS:
        _draws.popitem(last=False)
    return generator
