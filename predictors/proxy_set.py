"""A few samples that rank candidates as all of them do (FlashEval, arXiv 2403.16379).

Models were measured once on all samples. A search (``proxy_search``) sees one part of them; what the others
say of the set that it found is reported beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

import numpy as np

from autocomp.errors import SpaceError
from autocomp.predictors.proxy_scores import Floats, Indices, Score
from autocomp.predictors.proxy_search import Ranking, frequency, match

Method = Literal["match", "frequency"]

_MEANS = (
    "tau_train", "tau_test", "random_mean", "random_sd", "random_large", "plain_test", "random_plain",
)  # fmt: skip


@dataclass(frozen=True)
class ProxySet:
    """Samples to score candidates on, and how well they rank models.

    Attributes:
        indices: the chosen samples, rising.
        samples: how many there were to choose from.
        method: the search that found them.
        tau_train, tau_test: Kendall's tau with the full set's ranking, over pairs of models that the full set
            tells apart, on the models of the search and on those left out of it. A ``tau_test`` far below
            ``tau_train`` says that the search fitted its models.
        random_mean, random_sd: tau of random sets of the same size on the left-out models.
        random_large: mean tau of random sets ten times as large on the left-out models; NaN when there are
            not that many samples.
        plain_test: tau-b over all pairs of left-out models, ties of the full set included.
        pairs_test, clear_test: number of pairs of left-out models, and of those told apart.
        final: whether ``indices`` come from a search with all models (the taus are of the same search with
            the left-out ones unseen).
        random_plain: mean of tau-b of random sets, over all pairs of left-out models.
        halves: random choices of left-out models that the taus are means over.
        data: what identifies the samples, for whoever uses the set: indices mean nothing elsewhere.
    """

    indices: tuple[int, ...]
    samples: int
    method: Method
    tau_train: float
    tau_test: float
    random_mean: float
    random_sd: float
    random_large: float
    plain_test: float
    pairs_test: int
    clear_test: int
    final: bool = False
    random_plain: float = math.nan
    halves: int = 1
    data: Mapping[str, int | str] = field(default_factory=dict)

    def text(self) -> str:
        """What a user wants to know, in three lines."""

        def line(name: str, value: float, plain: float, spread: str = "") -> str:
            return (
                f"  {name:<8}{value:.3f}{spread} on the pairs that all samples tell apart, {plain:.3f} on all"
            )

        return "\n".join(
            [
                f"{len(self.indices)} of {self.samples}: Kendall's tau with the ranking by all of them, on "
                "models that the search did not see",
                line("chosen", self.tau_test, self.plain_test),
                line("random", self.random_mean, self.random_plain, f" ± {self.random_sd:.3f}"),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON; NaN is null."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}

    def save(self, path: Path) -> None:
        """Write JSON; ``data.subset`` of a workload reads its ``indices``, and its ``data`` where it has to
        know what they are of."""
        path.write_text(json.dumps(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            SpaceError: the file holds something else.
        """
        try:
            read: dict[str, Any] = json.loads(path.read_text())
            data: dict[str, Any] = {k: math.nan if v is None else v for k, v in read.items()}
            return cls(**{**data, "indices": tuple(int(i) for i in read["indices"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpaceError(f"{path} is no proxy set ({error}); write one with ProxySet.save") from None


def choose_samples(
    score: Score, size: int, *, method: Method = "match", held_out: float = 0.5, margin: float = 1.0,
    seed: int = 0, draws: int = 100, test: Indices | None = None, final: bool = False,
) -> ProxySet:  # fmt: skip
    """Search ``size`` samples on some of the models and report how they rank the others.

    Args:
        held_out: share of the models that the search does not see, drawn at random.
        margin: standard errors below which two models count as tied.
        draws: random sets to compare with.
        test: the models to leave out, instead of a random share (other kinds of models, say).
        final: search once more with all models and return that set, reported by the first one's taus.

    Raises:
        SpaceError: ``size`` is no number of samples, or either part has fewer than three models.
    """
    rng = np.random.default_rng(seed)
    if not 1 < size <= score.samples:
        raise SpaceError(f"a proxy set has 2 to {score.samples} samples; got {size}")
    if test is None:
        test = rng.permutation(score.models)[: round(held_out * score.models)]
    train = np.setdiff1d(np.arange(score.models), test)
    if min(len(train), len(test)) < 3:
        raise SpaceError(f"{len(train)} models to search with and {len(test)} to check with; both need three")
    seen, unseen = score.of(train), score.of(test)
    chosen = _search(seen, size, method, margin, rng)
    ranking = Ranking.of(unseen, margin)
    large = 10 * size
    values = _random(unseen, size, draws, rng)
    randoms = ranking.tau(values)
    return ProxySet(
        indices=tuple(int(i) for i in (_search(score, size, method, margin, rng) if final else chosen)),
        samples=score.samples,
        method=method,
        tau_train=float(Ranking.of(seen, margin).tau(seen(chosen[None]))[0]),
        tau_test=float(ranking.tau(unseen(chosen[None]))[0]),
        random_mean=float(randoms.mean()),
        random_sd=float(randoms.std()),
        random_large=(
            float(ranking.tau(_random(unseen, large, max(draws // 10, 3), rng)).mean())
            if large < score.samples
            else math.nan
        ),
        plain_test=_plain_tau(unseen.full, unseen(chosen[None])[0]),
        pairs_test=ranking.pairs,
        clear_test=len(ranking.sign),
        final=final,
        random_plain=float(np.mean([_plain_tau(unseen.full, row) for row in values])),
    )


def choose_and_check(
    score: Score, size: int, *, halves: int = 5, method: Method = "match", margin: float = 1.0, seed: int = 0,
    draws: int = 100,
) -> ProxySet:  # fmt: skip
    """A set searched on all models, with taus that are means over searches on random halves of them.

    One half of a few dozen models is a matter of luck; see ``choose_samples`` for the rest.

    Raises:
        SpaceError: as ``choose_samples``, or ``halves`` is not positive.
    """
    if halves < 1:
        raise SpaceError(f"a proxy set is checked on one or more halves of the models; got {halves}")
    checks = [
        choose_samples(score, size, method=method, margin=margin, seed=seed + i, draws=draws)
        for i in range(halves)
    ]
    chosen = _search(score, size, method, margin, np.random.default_rng(seed))
    means: dict[str, Any] = {name: fmean(getattr(c, name) for c in checks) for name in _MEANS}
    means["clear_test"] = round(fmean(c.clear_test for c in checks))
    indices = tuple(int(i) for i in chosen)
    return replace(checks[0], indices=indices, final=True, halves=halves, **means)


def _search(score: Score, size: int, method: Method, margin: float, rng: np.random.Generator) -> Indices:
    if method == "match":
        return match(score, size, rng)
    return frequency(score, size, rng, margin=margin)


def _random(score: Score, size: int, draws: int, rng: np.random.Generator) -> Floats:
    """Values ``[draws, models]`` of random sets."""
    return score(np.stack([rng.permutation(score.samples)[:size] for _ in range(draws)]))


def _plain_tau(a: Floats, b: Floats) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)
