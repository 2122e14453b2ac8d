"""`WildtypeDifference` in mode "delta" against "lazy", which it equals: steps of training, by kind and number of layers.

    python -m benchmarks.methods.delta [--layers 1 2 3] [--convs sage gin gat] [--genes 6607] [--batch-size 28]

Predictions and gradients are first compared in float64. Writes `delta.json` and `delta.md` to `benchmarks/results/<device>/`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellattn import MultiGraph
from cellattn._file import write_atomic
from cellattn.data import PERTURBATION_TYPES, PerturbationDataset, synthetic_cell
from cellattn.nn import WildtypeDifference
from cellattn.nn.wildtype import CONVS

from .. import options
from ..measure import environment, results_dir, table
from ..training.engine import Execution, Trainer
from .registry import DIM, on_cell
from .workload import SET_SIZE, random_mutants, time_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPARED = 2  # samples whose predictions and gradients are compared


def network(graph: MultiGraph, conv: str, num_layers: int, mode: str) -> WildtypeDifference:
    """The same weights in both modes."""
    torch.manual_seed(0)
    return WildtypeDifference(
        DIM, num_layers, relations=graph.relations, num_types=len(PERTURBATION_TYPES), num_genes=graph.num_nodes,
        conv=conv, mode=mode, dropout=0.0,
    ).to(graph.device)  # fmt: skip


def difference(graph: MultiGraph, data: PerturbationDataset, conv: str, num_layers: int) -> float:
    """The largest of predictions and gradients of the two modes in float64, each as a share of its largest entry."""
    batch = data.__getitems__(range(COMPARED)).to(graph.device)

    def outcome(mode: str) -> list[Tensor]:
        model = network(graph, conv, num_layers, mode).double()
        prediction = model(graph, batch.seeds, batch.ptr, batch.types).prediction
        grads = torch.autograd.grad(prediction.square().sum(), list(model.parameters()), allow_unused=True)
        return [prediction.detach(), *(grad for grad in grads if grad is not None)]

    pairs = zip(outcome("lazy"), outcome("delta"), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)


def run(
    convs: Sequence[str] = CONVS,
    layers: Sequence[int] = (1, 2, 3),
    *,
    genes: int = 6607,
    batch_size: int = 28,
    steps: int = 5,
    seconds: float = 5.0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compare and time both modes for each kind and number of layers, and write the results.

    Args:
        steps, seconds: of each measurement, at most.
        out: folder of the results; that of this device if None.
    """
    graph = synthetic_cell(seed=0, num_genes=genes).to(DEVICE)
    data = random_mutants(genes, max(10 * batch_size, COMPARED), SET_SIZE)
    rows: list[dict[str, Any]] = []
    for conv in convs:
        for num_layers in layers:
            row: dict[str, Any] = {"conv": conv, "layers": num_layers, "error": difference(graph, data, conv, num_layers)}
            for mode in ("lazy", "delta"):
                model = network(graph, conv, num_layers, mode)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
                trainer = Trainer(model, on_cell(graph), optimizer, execution=Execution(DEVICE))
                row[mode] = time_steps(trainer, data, batch_size, steps=steps, warmup=1, seconds=seconds)
            rows.append(row)
    result = {
        "environment": environment(),
        "genes": genes,
        "entries": graph.num_edges(),
        "batch_size": batch_size,
        "rows": rows,
    }
    folder = results_dir() if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "delta.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(folder / "delta.md", page(result).encode())
    return result


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    head = ["layers", "lazy, ms", "delta, ms", "lazy over delta", "lazy, peak MB", "delta, peak MB", "error in float64"]
    lines = []
    for row in result["rows"]:
        lazy, delta = (row[mode]["model"]["median"] for mode in ("lazy", "delta"))
        peaks = [f"{row[mode]['peak_bytes'] / 1e6:,.0f}" for mode in ("lazy", "delta")]
        times = [f"{1e3 * lazy:,.0f}", f"{1e3 * delta:,.0f}", f"{lazy / delta:.2f} x"]
        lines.append([f"{row['layers']} {row['conv']}", *times, *peaks, f"{row['error']:.0e}"])
    return f"""# The difference alone

{about}

Forward and backward, medians; synthetic cell of {result["genes"]:,} genes and {result["entries"]:,} entries, batches of
{result["batch_size"]} sets of {SET_SIZE} genes, width {DIM}, float32. The error is the largest difference between the modes, of
{COMPARED} predictions and of every gradient, each as a share of its largest entry, in float64.

{table(head, lines)}
"""


def main() -> None:
    parser = options.parser("methods.delta", __doc__)
    parser.add_argument("--convs", nargs="+", choices=CONVS, default=CONVS, help="kinds of layers (default: all)")
    parser.add_argument("--layers", nargs="+", type=options.count, default=(1, 2, 3), help="numbers of layers (default: 1 2 3)")
    parser.add_argument("--genes", type=options.genes, default=6607, help="of the synthetic cell (%(default)s)")
    parser.add_argument("--batch-size", type=options.count, default=28, help="sets in a batch (%(default)s)")
    parser.add_argument("--out", type=options.results, help="folder of the results (default: that of this device)")
    given = parser.parse_args()
    print(page(run(given.convs, given.layers, genes=given.genes, batch_size=given.batch_size, out=given.out)))


if __name__ == "__main__":
    main()
