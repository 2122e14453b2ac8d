"""Layers of a graph network over several relations, GraphSAGE, GIN and attention, in the one form of `WildtypeDifference`.

    t_i  = own(x_i) + sum_r c_ri sum_j A^r_ij w^r_ij send(x_j)_r          x'_i = update(t_i)

A layer has no sum over neighbours of its own: that is `relational_spmm`, between whichever genes are there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._check import read_directly

SCORE_CAP = 5.0  # an edge weighs at most e^10 = 22,026 times another of equal weight


class RelationalConv(nn.Module):
    """One layer of F: what a gene keeps, what it sends along each of K relations, and what it makes of the total.

    `own` maps x [V, dim] to [V, C], `send` to [V, K, C], `update` totals [V, C] to [V, dim].
    """

    averages = False  # whether c_ri is 1 / (number of neighbours there), or 1

    def own(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def send(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, total: Tensor) -> Tensor:
        raise NotImplementedError

    def sent_change(self, new: Tensor, old: Tensor, keep: Tensor) -> Tensor:
        """send(new) - send(old), [V, K, C], where genes with keep, bool [V], False send nothing for new, in which they are 0.

        This is for a linear `send`.
        """
        return self.send(new - old)


class SAGEConv(RelationalConv):
    """x'_i = relu(norm(W_0 x_i + b + sum_r mean_j w^r_ij W_r x_j)), as GraphSAGE (Hamilton et al. 2017) on each relation.

    The mean divides by the number of neighbours there; a gene without any adds nothing.
    """

    averages = True

    def __init__(self, dim: int, num_relations: int) -> None:
        super().__init__()
        self.own_weight = nn.Linear(dim, dim)
        self.message = nn.Linear(dim, num_relations * dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def own(self, x: Tensor) -> Tensor:
        return self.own_weight(x)

    def send(self, x: Tensor) -> Tensor:
        return self.message(x).unflatten(-1, (-1, x.shape[-1]))

    def update(self, total: Tensor) -> Tensor:
        return F.relu(self.norm(total))


class GINConv(RelationalConv):
    """x'_i = W relu(norm(b + sum_r W_r ((1 + eps_r) x_i + sum_j w^r_ij x_j))) + b', as GIN (Xu et al. 2019) by relation."""

    def __init__(self, dim: int, num_relations: int) -> None:
        super().__init__()
        self.message = nn.Linear(dim, num_relations * dim, bias=False)
        self.eps = nn.Parameter(torch.zeros(num_relations))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def own(self, x: Tensor) -> Tensor:
        by_relation = read_directly("message", self.message).weight.unflatten(0, (len(self.eps), -1))
        return F.linear(x, torch.einsum("r,roi->oi", 1 + self.eps, by_relation), self.bias)

    def send(self, x: Tensor) -> Tensor:
        return self.message(x).unflatten(-1, (len(self.eps), -1))

    def update(self, total: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(total)))


class GATConv(RelationalConv):
    """x'_i = relu(norm(sum_rj alpha_rij W_r x_j)), each head by itself, over all relations' neighbours and the gene itself.

        alpha_rij = w^r_ij exp(e_rj) / (exp(e_0i) + sum_sk w^s_ik exp(e_sk)),    e_rj = cap(a_r . W_r x_j)

    with r = 0 for the gene itself (w = 1), and one softmax across relations (Busbridge et al. 2019), so that attention weighs
    relations too. A score knows the sender alone: *static* attention, which ranks all receivers' neighbours alike, as that of
    GAT (Velickovic et al. 2018) does as well (Brody et al. 2022). So numerator and denominator are one product, of messages
    [exp(e) W_r x, exp(e)], and no edge has a score of its own.

    cap(s) = 5 tanh(s / 5) in the place of the shift by each row's largest score: no exponential overflows, no denominator
    vanishes, and what a difference cancels is at most e^10 of what is left.
    """

    def __init__(self, dim: int, num_relations: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.own_weight = nn.Linear(dim, dim, bias=False)
        self.message = nn.Linear(dim, num_relations * dim, bias=False)
        self.own_score = nn.Parameter(torch.empty(1, num_heads, dim // num_heads))
        self.score = nn.Parameter(torch.empty(num_relations, num_heads, dim // num_heads))
        self.norm = nn.LayerNorm(dim)
        for score in (self.own_score, self.score):
            nn.init.normal_(score, std=score.shape[-1] ** -0.5)

    def own(self, x: Tensor) -> Tensor:
        return self._weighted(x, read_directly("own_weight", self.own_weight).weight, self.own_score).squeeze(1)

    def send(self, x: Tensor) -> Tensor:
        return self._weighted(x, read_directly("message", self.message).weight, self.score)

    def update(self, total: Tensor) -> Tensor:
        total = total.unflatten(-1, (self.num_heads, -1))
        numerator, denominator = total.split([total.shape[-1] - 1, 1], dim=-1)
        return F.relu(self.norm((numerator * denominator.reciprocal()).flatten(-2)))

    def sent_change(self, new: Tensor, old: Tensor, keep: Tensor) -> Tensor:
        return self._weighted(new, read_directly("message", self.message).weight, self.score, keep) - self.send(old)

    def _weighted(self, x: Tensor, weight: Tensor, score: Tensor, keep: Tensor | None = None) -> Tensor:
        """Every head's [exp(e) W x, exp(e)] of x [V, dim], weight [K * dim, dim], score [K, H, D]: [V, K, H * (D + 1)].

        Rows that keep, bool [V], does not keep are 0.
        """
        weight = weight.unflatten(0, score.shape)  # [K, H, D, dim]
        s = F.linear(x, torch.einsum("khd,khdi->khi", score, weight).flatten(0, 1))
        p = torch.exp(SCORE_CAP * torch.tanh(s / SCORE_CAP)).unflatten(-1, (*score.shape[:2], 1))
        p = p if keep is None else p * keep[:, None, None, None]
        # [W x, 1] in one product
        one = F.pad(torch.zeros_like(score), (0, 1), value=1.0)
        y = F.linear(x, F.pad(weight, (0, 0, 0, 1)).flatten(0, 2), one.flatten()).unflatten(-1, one.shape)
        return (p * y).flatten(-2)
