"""What is done with a unit: its sets are made, scored by every model, counted, and the rows to keep chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import polars as pl
import torch
from torch import Tensor

from ..data.dataset import PERTURBATION_TYPES
from ..genes import GeneList
from .agreement import Agreement
from .keep import Keep, score_of
from .measured import MeasuredSets
from .members import Member
from .scorers import Scorer, on_threads
from .store import ScreenError, Unit

CHUNK = 1 << 16  # ranks that are scored at a time, between which a run can be interrupted


class Sets(Protocol):
    """Sets of genes, counted by rank; see `SetSpace`."""

    order: int
    total: int

    def block(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of ranks begin to end: those that stay, int64 [B], ascending; their genes int64 [B, k] and types, where they vary."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values that say which sets they are."""
        ...


class Tables(Protocol):
    """What is counted over all sets."""

    def add(self, genes: Tensor, mean: Tensor, sd: Tensor) -> None:
        """Genes int64 [B, k]; mean and standard deviation over the models, float64 [B]."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All of it."""
        ...


class Result(NamedTuple):
    """A unit, computed."""

    rows: pl.DataFrame
    tables: dict[str, Tensor]
    sets: int


@dataclass
class Job:
    """All that a worker needs; it can be sent to another process.

    Attributes:
        sets: to score.
        members: of the ensemble.
        roster: genes of which sets are made, in the order in which a reader's categories list them.
        keep: which rows to keep.
        tables: makes empty ones.
        options: of `make_scorer`.
        measured: whose support each kept row gets; None: it gets none.
    """

    sets: Sets
    members: Sequence[Member]
    names: GeneList
    roster: Tensor
    keep: Keep
    tables: Callable[[], Tables]
    options: dict[str, Any]
    measured: MeasuredSets | None = None

    def __post_init__(self) -> None:
        self._scorers: list[Scorer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_scorers": None}  # they are made where they score

    def forget_scorers(self) -> None:
        """Make them anew, as the options are now."""
        self._scorers = None

    @property
    def scorers(self) -> list[Scorer]:
        """One a member; the first use encodes the cell."""
        if self._scorers is None:
            self._scorers = [member.scorer(**self.options) for member in self.members]
        return self._scorers

    def try_first(self) -> Tensor | None:
        """Score some of the first sets: what the models cannot be asked for is said before there is a folder of such a screen.

        Returns:
            Float64 [M, up to 16], a row a model; None where filters leave none of the first sets.

        Raises:
            FloatingPointError: a prediction that is not finite.
        """
        genes, types = self._first()
        if len(genes) == 0:  # and no model is asked for nothing
            return None
        scores = torch.stack([scorer.score(genes, types).cpu().double() for scorer in self.scorers])
        self._require_finite(scores, genes)
        return scores

    def _first(self) -> tuple[Tensor, Tensor | None]:
        """Some of the first sets, genes and types; two at least where there are, for one alone hides its dimension."""
        _, genes, types = self.sets.block(0, min(CHUNK, self.sets.total))
        at = torch.linspace(0, len(genes) - 1, min(len(genes), 16), dtype=torch.float64).long()
        return genes[at].contiguous(), None if types is None else types[at].contiguous()

    def agree(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether one model may have made both of two predictions, float64 [M, P], on two processors: bool [M, P].

        What is told apart is a model and another one. The share of the largest that is let pass is generous, since a prediction
        that is a difference loses a tenth of itself and more in 16 bits, and what is next to nothing in standard deviations of
        a phenotype is let pass, too.
        """
        weights = (x.dtype for member in self.members for x in member.model.parameters())
        low = self.options["dtype"] == torch.bfloat16 or any(dtype in (torch.bfloat16, torch.float16) for dtype in weights)
        return (a - b).abs() <= (0.5 if low else 0.1) * a.abs().amax(1, keepdim=True) + 1e-4

    def require_predictions(self, before: list[list[float]] | None) -> None:
        """Hold the models to what they predicted of the first sets when the screen was begun; None: it is not known.

        A digest is of weights. What a module of one's own holds in plain attributes, its code and hooks are in none.

        Raises:
            ScreenError: one predicts something else.
        """
        now = None if before is None else self.try_first()
        if now is None:
            return
        try:
            then = torch.tensor(before, dtype=torch.float64).view_as(now)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScreenError(f"folder: the predictions of the first sets, which it keeps, are damaged: {error}") from error
        wrong = (~self.agree(then, now)).nonzero().tolist()
        if wrong:
            member, row = wrong[0]
            genes, _ = self._first()
            named = ", ".join(self.names[gene] for gene in genes[row].tolist())
            raise ScreenError(
                f"models: {self.members[member].name} predicts {float(now[member, row]):.6g} for {{{named}}}, and predicted "
                f"{float(then[member, row]):.6g} when this screen was begun, of equal weights: its code, attributes or hooks "
                "are others; expected the model that the units there were computed with, or another folder"
            )

    def compute(self, unit: Unit, on_ranks: Callable[[int], Any] = lambda ranks: None) -> Result:
        """Score the sets of a unit; on_ranks is told how many ranks further it is.

        Raises:
            FloatingPointError: a prediction that is not finite; it names the model and the set.
        """
        # all of a unit, not its scores alone: threads that count tensors would spin on other processes' cores
        with on_threads(self.options["num_threads"]):
            return self._compute(unit, on_ranks)

    def _compute(self, unit: Unit, on_ranks: Callable[[int], Any]) -> Result:
        tables, agreement, rows, sets = self.tables(), Agreement(len(self.members)), _Rows(self.keep), 0
        for begin in range(unit.begin, unit.end, CHUNK):
            end = min(begin + CHUNK, unit.end)
            rank, genes, types = self.sets.block(begin, end)
            if len(rank):
                # a scorer goes through the sets, all else here through their columns, which are contiguous in a block
                given = genes.contiguous(), None if types is None else types.contiguous()
                scores = torch.stack([scorer.score(*given).cpu().double() for scorer in self.scorers])
                self._require_finite(scores, genes)
                mean, sd = scores.mean(0), _sd(scores)
                tables.add(genes, mean, sd)
                agreement.add(scores)
                rows.add(_Part(rank, genes, types, mean, sd, scores.amin(0), scores.amax(0)))
                sets += len(rank)
            on_ranks(end - begin)
        return Result(self._frame(rows), tables.state() | agreement.state(), sets)

    def _require_finite(self, scores: Tensor, genes: Tensor) -> None:
        if scores.isfinite().all():
            return
        member, row = (~scores.isfinite()).nonzero()[0].tolist()
        named = ", ".join(self.names[gene] for gene in genes[row].tolist())
        raise FloatingPointError(f"{self.members[member].name} predicts {float(scores[member, row])} for {{{named}}}")

    def _frame(self, rows: _Rows) -> pl.DataFrame:
        kept = rows.all(_Part.empty(*self.sets.block(0, 0)))
        names = pl.Series([self.names[gene] for gene in self.roster.tolist()], dtype=pl.String)
        categories = names.cast(pl.Enum(names))
        position = torch.full((len(self.names),), -1).index_put_((self.roster,), torch.arange(len(self.roster)))
        columns: dict[str, Any] = {"rank": kept.rank.numpy()}
        for place, gene in enumerate(kept.genes.unbind(1)):
            columns[f"gene{place + 1}"] = categories.gather(position[gene].numpy())
        if kept.types is not None:
            kinds = pl.Series(PERTURBATION_TYPES, dtype=pl.Enum(PERTURBATION_TYPES))
            for place, kind in enumerate(kept.types.unbind(1)):
                columns[f"type{place + 1}"] = kinds.gather(kind.numpy())
        columns["mean"], columns["sd"] = kept.mean.float().numpy(), kept.sd.float().numpy()
        if len(self.members) > 1:
            columns["min"], columns["max"] = kept.low.float().numpy(), kept.high.float().numpy()
        if self.measured is not None:
            for place, count in enumerate(self.measured.support(kept.genes).unbind(1)):
                columns[f"share{place + 1}"] = count.to(torch.int32).numpy()
            if self.measured.range is not None:
                columns["outside"] = self.measured.outside(kept.mean, phenotype=self.options["phenotype"]).numpy()
        return pl.DataFrame(columns)


def _sd(scores: Tensor) -> Tensor:
    """Over the models, with n - 1 below the sum; 0 of one model. Scores float64 [M, B] to [B]."""
    return scores.std(0) if len(scores) > 1 else torch.zeros_like(scores[0])


class _Part(NamedTuple):
    """Rows, by column."""

    rank: Tensor
    genes: Tensor
    types: Tensor | None
    mean: Tensor
    sd: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, rank: Tensor, genes: Tensor, types: Tensor | None) -> _Part:
        """Of no rows."""
        return cls(rank, genes, types, *(torch.empty(0, dtype=torch.float64) for _ in range(4)))

    def take(self, at: Tensor) -> _Part:
        return _Part(*(None if x is None else x[at] for x in self))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: Sequence[_Part]) -> _Part:
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
        return _Part(*columns)  # type: ignore[arg-type]


class _Rows:
    """Rows kept so far: of a unit, no more than it has; of the best, a few times as many as are asked for and a chunk."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.parts: list[_Part] = []
        self.held = 0
        self.between = (float("inf"), float("-inf"))  # scores of rows that are at neither end, as far as is known

    def add(self, part: _Part) -> None:
        score = self._score(part)
        if self.keep.size is None:
            chosen = self.keep.choose(score)
        else:
            low, high = self.between
            chosen = None if low == float("inf") else ((score <= low) | (score >= high)).nonzero()[:, 0]
        self.parts.append(part if chosen is None else part.take(chosen))
        self.held += len(self.parts[-1].rank)
        if self.keep.size is not None and self.held > 4 * self.keep.size:
            best = self._trimmed()
            score = self._score(best).sort().values
            self.parts, self.held = [best], len(score)
            low = float(score[self.keep.size - 1]) if self.keep.has_low_end else float("-inf")
            self.between = low, float(score[-self.keep.size])

    def all(self, nothing: _Part) -> _Part:
        """What is kept of all that was added; nothing where nothing was."""
        if not self.parts:
            return nothing
        return self._trimmed()

    def _score(self, part: _Part) -> Tensor:
        return score_of(part.mean, part.sd, self.keep.by)

    def _trimmed(self) -> _Part:
        part = _Part.join(self.parts)
        chosen = self.keep.choose(self._score(part))
        return part if chosen is None else part.take(chosen)
