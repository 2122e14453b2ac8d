"""The attention family against what a user would write in plain PyTorch: time, peak memory and error in one run.

    python -m benchmarks.bench_attention

For every row: forward and backward, ours beside dense eager autograd and the same under torch.compile. Ours is first held
to a dense float64 computation; a row whose error is above its bound is reported as wrong, without a speed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import nvtx
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cellattn
from cellattn import MultiGraph, reference

from .cells import benchmark_graph
from .measure import environment, median_time, peak_memory, results_dir

# Errors are relative to the largest entry; float32 sums over 6,607 genes in another order than float64 leave about 1e-6.
MAX_ERROR = 2e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """One row: `ours` and `dense` map the inputs to a tuple of outputs; `exact` is `dense` on float64 inputs, in pieces."""

    name: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., tuple[Tensor, ...]]
    dense: Callable[..., tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]]


@dataclass
class Row:
    """What was measured: seconds (median, q20, q80), bytes, and the largest relative error of outputs and gradients."""

    name: str
    error: float
    ours: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    compiled: dict[str, float] = field(default_factory=dict)


def leaf(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()


def dense_kl(q: Tensor, k: Tensor, target: Tensor) -> Tensor:
    """KL of one head as users write it, with a prefix token: mean over the rows with an edge."""
    alpha = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[1:, 1:]
    return F.kl_div((alpha + 1e-8).log(), target, reduction="sum") / (target.sum(1) > 0).sum()


def cases(graph: MultiGraph, *, heads: int, head_dim: int) -> Iterator[Case]:
    """The rows, largest first; dense targets are made once, outside the clock."""
    t, device = graph.num_nodes + 1, graph.device
    ties = [(relation, head) for head, relation in enumerate(graph.relations[:heads])]
    q, k, v = (leaf(heads, t, head_dim, seed=seed, device=device) for seed in range(3))
    targets = [reference.target(graph, relation)[0].float() for relation, _ in ties]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, losses = cellattn.graph_attention(q, k, v, graph, ties)
        return out, *losses

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        alpha = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        losses = []
        for (_, head), target in zip(ties, targets, strict=True):
            log_alpha = (alpha[head, 1:, 1:] + 1e-8).log()
            losses.append(F.kl_div(log_alpha, target, reduction="sum") / (target.sum(1) > 0).sum())
        return alpha @ v, *losses

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = torch.stack([reference.attention(q[h], k[h], v[h])[0] for h in range(heads)])
        return out, *(reference.attention_kl(q[h], k[h], graph, r, num_prefix=1) for r, h in ties)

    yield Case(f"graph_attention, {heads} heads of {head_dim}, {len(ties)} graphs tied", (q, k, v), ours, dense, exact)

    def dense_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    def exact_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        pairs = [reference.attention(q[h], k[h], v[h]) for h in range(heads)]
        return torch.stack([out for out, _ in pairs]), torch.stack([lse for _, lse in pairs])

    yield Case(f"attention with lse, {heads} heads of {head_dim}", (q, k, v), cellattn.attention, dense_lse, exact_lse)

    relation, target = graph.relations[0], targets[0]
    q1, k1 = (x[0].detach().requires_grad_() for x in (q, k))
    yield Case(
        f"attention_kl, one head, {relation}",
        (q1, k1),
        lambda q, k: (cellattn.attention_kl(q, k, graph, relation, num_prefix=1),),
        lambda q, k: (dense_kl(q, k, target),),
        lambda q, k: (reference.attention_kl(q, k, graph, relation, num_prefix=1),),
    )

    counted = target.sum(1) > 0

    def dense_bce(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        alpha = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[1:, 1:]
        return (F.binary_cross_entropy(alpha[counted], target[counted], reduction="sum") / counted.sum(),)

    yield Case(
        f"attention_bce, one head, every non-edge, {relation}",
        (q1, k1),
        lambda q, k: (cellattn.attention_bce(q, k, graph, relation, num_prefix=1),),
        dense_bce,
        lambda q, k: (reference.attention_bce(q, k, graph, relation, num_prefix=1),),
    )

    b, d = 256, 64
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(graph.num_nodes, generator=g)[:2] for _ in range(b)]).flatten().to(device)
    ptr = 2 * torch.arange(b + 1, device=device)
    shapes = (b, d), (t - 1, d), (t - 1, d), (2 * b, d)
    head = tuple(leaf(*shape, seed=seed, device=device) for seed, shape in enumerate(shapes, start=3))

    def dense_head(query: Tensor, key: Tensor, value: Tensor, override: Tensor) -> tuple[Tensor, ...]:
        values = value.expand(b, -1, -1).clone()
        values[torch.arange(b, device=device).repeat_interleave(2), index] = override
        beta = (query @ key.mT * d**-0.5).softmax(-1)
        return (torch.einsum("bn,bnd->bd", beta, values),)

    def head_op(module: Any) -> Callable[..., tuple[Tensor, ...]]:
        return lambda q, k, v, u: (module.perturbation_attention(q, k, v, index, ptr, u, scale=d**-0.5),)

    yield Case(f"perturbation_attention, {b} sets of 2, width {d}", head, head_op(cellattn), dense_head, head_op(reference))


def step(f: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Forward and backward: outputs and gradients of their weighted sum."""
    with nvtx.annotate("forward", domain="cellattn"):
        outputs = f(*inputs)
        total = torch.stack([(i + 1) * y.sum() for i, y in enumerate(outputs)]).sum()
    with nvtx.annotate("backward", domain="cellattn"):
        grads = torch.autograd.grad(total, inputs)
    return [*(y.detach() for y in outputs), *grads]


def largest_error(case: Case) -> float:
    got = step(case.ours, case.inputs)
    want = step(case.exact, tuple(x.detach().double().requires_grad_() for x in case.inputs))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def measure(case: Case, *, repeats: int, progress: Callable[[str], None]) -> Row:
    progress(f"{case.name}: check")
    row = Row(case.name, largest_error(case))
    if not row.error <= MAX_ERROR:
        return row
    torch._dynamo.reset()
    runs = {"ours": case.ours, "dense": case.dense, "compiled": torch.compile(case.dense)}
    for name, f in runs.items():
        progress(f"{case.name}: {name}")
        times = median_time(lambda f=f: step(f, case.inputs), repeats=repeats)  # type: ignore[misc]
        memory = peak_memory(lambda f=f: step(f, case.inputs))  # type: ignore[misc]
        setattr(row, name, {**times, "bytes": memory})
    return row


def table(rows: list[Row]) -> str:
    """The rows as markdown."""
    lines = [
        "| forward + backward | ours | dense eager | compiled | faster than eager | memory: ours | eager | compiled | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.ours:
            lines.append(f"| {row.name} | WRONG | | | | | | | {row.error:.1e} |")
            continue
        times = " | ".join(f"{getattr(row, name)['median'] * 1e3:,.0f} ms" for name in ("ours", "dense", "compiled"))
        memory = " | ".join(f"{getattr(row, name)['bytes'] / 1e6:,.0f} MB" for name in ("ours", "dense", "compiled"))
        ratio = row.dense["median"] / row.ours["median"]
        lines.append(f"| {row.name} | {times} | {ratio:.1f} x | {memory} | {row.error:.1e} |")
    return "\n".join(lines)


def run(*, heads: int = 4, head_dim: int = 16, repeats: int = 3, device: str = DEVICE) -> dict[str, Any]:
    """Measure every row; the result is written to `attention.json` and returned."""
    name, graph = benchmark_graph()
    graph = graph.to(device)
    rows = []
    with tqdm(cases(graph, heads=heads, head_dim=head_dim), total=5, desc="ops", unit="row") as bar:
        for case in bar:
            rows.append(measure(case, repeats=repeats, progress=bar.set_postfix_str))
    result = {"environment": environment(), "graph": name, "tokens": graph.num_nodes + 1, "rows": [asdict(row) for row in rows]}
    (results_dir() / "attention.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=DEVICE, help="cpu or cuda (%(default)s)")
    result = run(**vars(parser.parse_args()))
    print(table([Row(**row) for row in result["rows"]]))


if __name__ == "__main__":
    main()
