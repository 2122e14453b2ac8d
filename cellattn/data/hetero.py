"""Batches of mutants as PyG's `HeteroData`, with the field names that perturbation datasets for PyG have."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._check import describe, require, require_ragged, tensor_of, unknown, values_visible
from .._modes import without_function_modes

INDICES, TYPES, VALUES = "perturbation_indices", "perturbation_types", "phenotype_values"
VALUE_TYPES, VALUE_SAMPLES = "phenotype_type_indices", "phenotype_sample_indices"


class Fields(NamedTuple):
    """What a `HeteroData` says of its mutants."""

    seeds: Tensor  # int64 [nnz], genes, whatever was added to them in collation
    ptr: Tensor  # int64 [B + 1]
    types: Tensor | None  # int64 [nnz]
    y: Tensor  # float32 [B], or [B, P] of P phenotypes: [B, 0] where there are none


@without_function_modes
def write(
    seeds: Tensor, ptr: Tensor, types: Tensor, y: Tensor, num_genes: int, *, node_type: str, masks: bool, offset: bool
) -> Any:
    """See `PerturbationBatch.to_hetero_data`."""
    from torch_geometric.data import Batch

    from .._pyg import MutantData, NumberedMutantData

    num_sets, device = len(ptr) - 1, seeds.device
    graph = torch.arange(num_sets, device=device)
    sample = graph.repeat_interleave(ptr.diff())
    first = num_genes * graph  # where each sample's genes begin in the batch
    num_phenotypes = y.shape[1] if y.ndim == 2 else 1
    data = Batch(_base_cls=NumberedMutantData if offset else MutantData)
    genes = data[node_type]
    genes[INDICES] = seeds + first[sample] if offset else seeds
    genes[f"{INDICES}_batch"], genes[f"{INDICES}_ptr"], genes[TYPES] = sample, ptr, types
    if num_phenotypes:
        genes[VALUES] = y.reshape(-1)
        genes[VALUE_TYPES] = torch.arange(num_phenotypes, device=device).repeat(num_sets)
        genes[VALUE_SAMPLES] = graph.repeat_interleave(num_phenotypes)
    genes.num_nodes, genes._num_nodes = num_sets * num_genes, [num_genes] * num_sets
    # What PyG separates a batch by: where each sample's entries begin, and what was added to them.
    slices = dict.fromkeys((INDICES, TYPES), ptr.cpu())
    if num_phenotypes:
        slices |= dict.fromkeys((VALUES, VALUE_TYPES, VALUE_SAMPLES), num_phenotypes * torch.arange(num_sets + 1))
    added = dict.fromkeys(slices, torch.zeros(num_sets, dtype=torch.int64))
    if num_phenotypes:
        added[VALUE_SAMPLES] = graph.cpu()
    if offset:
        added[INDICES] = first.cpu()
    if masks:
        genes.pert_mask = torch.zeros(num_sets * num_genes, dtype=torch.bool, device=device)
        genes.pert_mask[seeds + first[sample]] = True
        genes.mask = ~genes.pert_mask
        genes.batch, genes.ptr = graph.repeat_interleave(num_genes), num_genes * torch.arange(num_sets + 1, device=device)
        for name in ("pert_mask", "mask"):
            slices[name], added[name] = num_genes * torch.arange(num_sets + 1), torch.zeros_like(graph, device="cpu")
    data._num_graphs, data._slice_dict, data._inc_dict = num_sets, {node_type: slices}, {node_type: added}
    return data


@without_function_modes
def read(data: Any, node_type: str) -> Fields:
    """See `PerturbationBatch.from_hetero_data`."""
    from torch_geometric.data import Batch

    require(hasattr(data, "node_types"), f"data: expected a HeteroData, got {describe(data)}")
    if node_type not in data.node_types:
        unknown("node_type", node_type, data.node_types)
    store = data[node_type]
    collated = isinstance(data, Batch)
    slices = data._slice_dict[node_type] if collated else {}
    seeds = _numbers(store, node_type, INDICES, whole=True)
    ptr = _ptr(store, node_type, slices, seeds)
    require_ragged(f"data: {INDICES}", seeds, ptr, ptr_name=f"data: {INDICES}_ptr")
    num_sets = len(ptr) - 1
    sample = torch.arange(num_sets, device=seeds.device).repeat_interleave(ptr.diff(), output_size=len(seeds))
    added = data._inc_dict[node_type][INDICES] if collated else None
    if added is not None and added.any():  # on the CPU, wherever the batch is
        seeds = seeds - added.reshape(-1).to(seeds.device)[sample]
    if values_visible(seeds) and len(seeds) and int(seeds.min()) < 0:
        position = int((seeds < 0).nonzero()[0])
        raise ValueError(f"data: {INDICES}: position {position} holds {int(seeds[position])}, expected an index of a gene")
    if "n_id" in store:  # subgraphs, whose genes are numbered anew
        n_id = _numbers(store, node_type, "n_id", whole=True)
        ends = store.ptr[1:][sample] if collated else torch.full_like(seeds, len(n_id))
        place = seeds + store.ptr[sample] if collated else seeds
        if values_visible(seeds) and bool((place >= ends).any()):
            position = int((place >= ends).nonzero()[0])
            raise ValueError(
                f"data: {INDICES}: position {position} holds {int(seeds[position])}, which its subgraph does not have"
            )
        seeds = n_id[place]
    types = _numbers(store, node_type, TYPES, whole=True) if TYPES in store else None
    if types is not None:
        require(len(types) == len(seeds), f"data: {TYPES}: expected {len(seeds)} entries as in {INDICES}, got {len(types)}")
    if not any(name in store for name in (VALUES, VALUE_TYPES, VALUE_SAMPLES)):
        return Fields(seeds, ptr, types, torch.empty(num_sets, 0, device=seeds.device))
    return Fields(seeds, ptr, types, _phenotypes(store, node_type, slices, num_sets))


def _numbers(store: Any, node_type: str, name: str, *, whole: bool) -> Tensor:
    """A field as one row of numbers, int64 where they are whole."""
    require(name in store, lambda: f"data: node type {node_type!r} has no {name}, but {', '.join(store.keys())}")
    value = tensor_of(store[name])
    if not isinstance(value, Tensor) and not isinstance(value, str):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # of several lengths, or no numbers
            value = torch.as_tensor(value)
    kind = "whole numbers" if whole else "numbers"
    if not isinstance(value, Tensor):
        raise TypeError(f"data: {name} of node type {node_type!r}: expected a tensor of {kind}, got {describe(value)}")
    good = value.layout == torch.strided and value.dtype != torch.bool and not value.is_complex()
    good = good and not (whole and value.is_floating_point() and value.numel())
    require(good, lambda: f"data: {name} of node type {node_type!r}: expected {kind}, got a {describe(value)}")
    return value.reshape(-1).long() if whole else value.reshape(-1)


def _ptr(store: Any, node_type: str, slices: dict[str, Tensor], seeds: Tensor) -> Tensor:
    """int64 [B + 1]: where each sample's genes begin, from their `_ptr`, from a PyG batch's own books, or one sample."""
    if f"{INDICES}_ptr" in store:
        return _numbers(store, node_type, f"{INDICES}_ptr", whole=True)
    if INDICES in slices:
        return slices[INDICES].to(seeds.device)
    require(f"{INDICES}_batch" not in store, f"data: has {INDICES}_batch but not {INDICES}_ptr, which tells empty sets apart")
    return torch.tensor([0, len(seeds)], device=seeds.device)


def _phenotypes(store: Any, node_type: str, slices: dict[str, Tensor], num_sets: int) -> Tensor:
    """float32 [B], or [B, P]: the values by sample and, where they have one, by ascending phenotype type."""
    values = _numbers(store, node_type, VALUES, whole=False)
    count = values.numel()
    whole = count == 0 if num_sets == 0 else count >= num_sets and count % num_sets == 0
    if VALUES in slices:  # a batch's own books, on the CPU
        whole = whole and bool((slices[VALUES].diff() == count // max(num_sets, 1)).all())
    require(whole, f"data: expected the same phenotypes for each of {num_sets} samples, got {count} {VALUES}")
    if count == 0:
        return values.float()
    per_sample = count // num_sets
    if VALUE_SAMPLES in store and VALUES not in slices:  # not every collation counts them up
        sample = _numbers(store, node_type, VALUE_SAMPLES, whole=True)
    else:
        sample = torch.arange(num_sets, device=values.device).repeat_interleave(per_sample)
    kind = torch.arange(count, device=values.device) % per_sample
    if VALUE_TYPES in store:
        kind = _numbers(store, node_type, VALUE_TYPES, whole=True)
    for name, numbers in ((VALUE_SAMPLES, sample), (VALUE_TYPES, kind)):
        require(len(numbers) == count, f"data: {name}: expected {count} entries as in {VALUES}, got {len(numbers)}")
    order = kind.argsort(stable=True)
    order = order[sample[order].argsort(stable=True)]
    if values_visible(values):
        samples, kinds = sample[order].view(num_sets, -1), kind[order].view(num_sets, -1)
        once = (samples == torch.arange(num_sets)[:, None]).all() and (kinds == kinds[:1]).all() and (kinds.diff() > 0).all()
        require(bool(once), f"data: expected every phenotype once for each of {num_sets} samples in {VALUE_TYPES}")
    y = values[order].view(num_sets, per_sample).float()
    return y[:, 0] if per_sample == 1 else y
