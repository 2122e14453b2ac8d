"""Train the cell transformer on measured double mutants, beside additive ridge and a pair MLP.

    python -m benchmarks.train [--data FOLDER] [--out FOLDER] [--tokens labelled|neighbours:N|full] [--full]
    torchrun --nproc-per-node 4 -m benchmarks.train [...]     # the same batches, shared by four processes

The data are the digenic interaction scores of Costanzo et al. 2016 for two GO terms, in the source's split, over the real
graphs; where the tables are missing, a synthetic cell and planted phenotypes. A fifth of the training pairs, drawn anew
for each seed, is held out for validation; the test pairs are looked at once a run, at the epoch that validated best. Beside
that split, whose test pairs are of genes that training has seen, all pairs are split anew so that no gene of a test pair was
trained on, and test Pearson of both is told side by side; --split takes others of `cellattn.data.split`.

Each run has a folder of its own under --out with `metrics.jsonl` (one line an epoch), `checkpoint.safetensors` and, once
finished, `result.json`; the graph that models are called with is beside the folders. The checkpoint holds the model of the
best validation epoch, as `cellattn.checkpoint` writes it, to screen with, and all that the run needs to go on. A run that was
interrupted goes on from its checkpoint to the same bits, one that has finished is read back.
"""

from __future__ import annotations

from collections.abc import Sequence

from cellattn._file import write_atomic
from cellattn.data.split import KINDS

from . import options
from .cells import data_dir
from .training.cell import SOURCE, load_cell
from .training.distributed import distributed, is_main
from .training.engine import AUTOCAST, Execution
from .training.runs import run
from .training.tables import table
from .training.variants import VARIANTS


def _variants() -> str:
    """A line a variant."""
    lines = []
    for name, variant in VARIANTS.items():
        told = f"{variant.title}; "
        if variant.model == "ridge":
            told += "one effect a gene, in closed form"
        else:
            how = variant.optimization
            told += f"{how.epochs} epochs of batches of {how.batch_size}"
            told += f", graph term weighted {variant.weight:g}" if variant.weight else ""
        lines.append(f"  {name:<14} {told}")
    lines.append("A graph term holds eight heads to as many graphs, one a head; of DANGO it is what it makes of its networks.")
    return "\n".join(["variants:", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser("train", __doc__, epilog=_variants())
    parser.add_argument(
        "--data", type=options.folder, help="folder of the yeast tables (default: CELLATTN_DATA, ../shared/data/yeast)"
    )
    parser.add_argument("--out", type=options.results, default="runs/training", help="folder of runs and results (%(default)s)")
    parser.add_argument(
        "--seeds",
        type=options.seed,
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="a run of each variant and split for each: initial weights, order of the data, the pairs that validate, and "
        "splits that are drawn anew; tables have the mean and standard deviation over them (0 1 2)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="VARIANT",
        help="models to train, by the names below (all)",
    )
    parser.add_argument("--epochs", type=options.count, help="of every run (default: each variant's own)")
    parser.add_argument("--tokens", help="labelled (default), neighbours:N or full")
    parser.add_argument(
        "--split",
        nargs="+",
        choices=(SOURCE, *KINDS),
        metavar="SPLIT",
        default=[SOURCE, "gene-disjoint"],
        help=f"of the pairs, side by side: {SOURCE}, as they come; or anew for each seed: {', '.join(KINDS)} "
        f"({SOURCE} gene-disjoint)",
    )
    parser.add_argument("--full", action="store_true", help="every gene a token, twice the epochs")
    parser.add_argument(
        "--checkpoint-steps", type=options.count, default=100, help="steps between two checkpoints (%(default)s)"
    )
    parser.add_argument("--device", type=options.device, choices=("cpu", "cuda"), help="cuda where there is one, if not given")
    parser.add_argument("--autocast", choices=AUTOCAST, help="dtype of matrix products")
    parser.add_argument(
        "--accumulate", type=options.count, default=1, help="passes in which a process computes its share of a batch"
    )
    parser.add_argument(
        "--compile", type=options.backend, nargs="?", const="inductor", metavar="BACKEND", help="with torch.compile"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="forward and backward as one CUDA graph")
    parser.add_argument(
        "--timeout", type=options.positive, default=300, help="seconds that a rank waits for the others (%(default)s)"
    )
    given = parser.parse_args(arguments)
    with distributed(given.device, timeout=given.timeout) as device:
        with options.told():
            cell = load_cell(given.data or data_dir(), given.tokens or ("full" if given.full else "labelled"))
            execution = Execution(str(device), given.autocast, given.accumulate, given.compile, given.cuda_graph)
        result = run(
            full=given.full,
            cell=cell,
            out=given.out,
            results=given.out,
            seeds=given.seeds,
            variants=given.variants,
            splits=given.split,
            epochs=given.epochs,
            checkpoint_steps=given.checkpoint_steps,
            execution=execution,
        )
        if is_main():
            write_atomic(given.out / "training.md", f"{table(result)}\n".encode())
            print(f"{table(result)}\n\nwritten to {given.out}")


if __name__ == "__main__":
    main()
