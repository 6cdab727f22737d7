"""What an additive table misses, learned from measured trials by Bayesian regression.

The model, with ``T`` the table's total and a logarithmic link where everything is positive::

    log y = a + (1 + b) log T + sum over effects (share * relative error) [+ curves] [+ GP] + noise

Curves are smooth functions of how many decisions take each option; the likelihood says whether there are any.

All unknowns have normal priors; ``posterior`` has the algebra. The scales of the priors maximise the marginal
likelihood over a small grid, and deviations are multiplied by what the errors of left-out trials say. Without
a table, or where values are not positive, the same regression works on ``y`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.additive import usable_trials
from autocomp.predictors.audit import rank_correlations
from autocomp.predictors.base import Prediction, log_normal
from autocomp.predictors.calibration import std_factor
from autocomp.predictors.features import Encoder
from autocomp.predictors.link import Link
from autocomp.predictors.posterior import Data, Inputs, Kind, Posterior, Scales, condition
from autocomp.predictors.relevance import with_relevance
from autocomp.predictors.tuning import Tuned, tune
from autocomp.space import AdditiveTable, Candidate, SearchSpace, Value
from autocomp.trial import Trial

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]

_TUNED_ON = {"ridge": 400, "gp": 250}
"""Trials that choose the scales and the factor of the deviations; a GP has more of them to choose."""
_MOST = 1000
"""Trials up to which the ``[n, n]`` form is quick: more are used as long as the ``[p, p]`` form is."""
_WORK = 2e9
"""Multiplications that the ``[p, p]`` form may take, ``n p^2``: some tenth of a second."""
_NEWEST = 2 / 3
"""Share of the trials used that are the latest, where not all can be."""


class ResidualPredictor:
    """Learns one metric around an additive table (or from nothing), with uncertainty.

    A fit takes some tenth of a second at most, however many trials there are: where options are many, the
    latest trials and a sample of the others stand for all. In a search the latest are those near the front,
    where predictions are asked for; the others, spread evenly over the metric's values, keep its whole range.

    Args:
        metric: what to predict.
        table: additive prior, or ``None``.
        space: decisions of the candidates.
        kind: ``ridge`` has effects only; ``gp`` adds a Gaussian process over the share of decisions
            that differ, which over floats learns how much each decision matters (``relevance``).

    Attributes:
        scales: of the priors, after the last fit.
        factor: by which deviations were multiplied because of the errors of left-out trials.
        cross_validated: Kendall's tau of the predictions of left-out trials (5 folds); NaN for few trials.
    """

    def __init__(
        self, metric: str, table: AdditiveTable | None, space: SearchSpace, kind: Kind = "ridge"
    ) -> None:
        self.metric, self.table, self.space, self.kind = metric, table, space, kind
        self.encoder = Encoder(space, table)
        self._reset()

    def _reset(self) -> None:
        self.scales = Scales(smooth=0.1 if self.kind == "gp" else 0.0)
        self.factor, self.cross_validated = 1.0, math.nan
        self._link = Link(self._starts_positive(), self.table is not None)
        self._codes, self._values, self._totals = np.zeros((0, len(self.space))), np.zeros(0), np.zeros(0)
        self._posterior: Posterior | None = None
        self._errors = 0.0

    def _starts_positive(self) -> bool:
        """Whether the table can only give positive totals."""
        if self.table is None:
            return False
        least = [
            min((c for c in r.values() if math.isfinite(c)), default=0.0) for r in self.table.costs.values()
        ]
        return self.table.base + sum(least) > 0

    # --- fitting ------------------------------------------------------------------------------------------

    def fit(self, trials: Sequence[Trial]) -> Self:
        """Forget what was learned and learn from ``trials``; failed, NaN and foreign ones are ignored.

        The result depends on the set of trials, not on their order.
        """
        self._reset()
        valued = [(t, t.value(self.metric)) for t in usable_trials(trials, self.metric)]
        valued.sort(key=lambda pair: (pair[0].candidate.fingerprint, pair[1]))
        used, values = [t for t, _ in valued], np.array([v for _, v in valued])
        rows = self._informative(values, np.array([t.number for t in used]))
        known = self.encoder.layout.code
        rows = [i for i in rows if known(used[i].candidate, keep=True) is not None]
        codes = self.encoder.rows([used[i].candidate for i in rows])
        totals = self.encoder.totals(codes)
        finite = np.isfinite(totals)
        if finite.any():
            self._codes, self._totals, self._values = codes[finite], totals[finite], values[rows][finite]
            self._learn(np.array([used[i].stderr(self.metric) for i in rows])[finite])
        return self

    def _informative(self, values: Floats, numbers: Integers) -> list[int]:
        """Rows of the newest trials, and of some others evenly over the metric, where all are too many."""
        most = _MOST if self.kind == "gp" else max(_MOST, int(_WORK / (self.encoder.size + 2) ** 2))
        rows = np.lexsort((values, -numbers))
        if len(rows) > most:
            new, old = np.split(rows, [int(_NEWEST * most)])
            old = old[np.argsort(values[old], kind="stable")]
            spread = np.linspace(0, len(old) - 1, most - len(new)).astype(np.intp)
            rows = np.concatenate([new, old[spread]])
        return [int(i) for i in np.sort(rows)]

    def _learn(self, stderr: Floats) -> None:
        positive = bool(np.all(self._values > 0) and (self.table is None or np.all(self._totals > 0)))
        sample = np.arange(len(self._values))
        if len(sample) > (most := _TUNED_ON[self.kind]):
            sample = np.linspace(0, len(sample) - 1, most).astype(np.intp)
        # Without a table nothing says whether effects multiply or add; the likelihood of the values does.
        unsure = positive and self.table is None and len(self._values) > 2
        found = [self._tuned(log, sample, stderr) for log in ([True, False] if unsure else [positive])]
        _, link, data, tuned = max(found, key=lambda f: f[0])
        if self.kind == "gp" and not self.space.is_categorical:
            tuned = with_relevance(data[sample], tuned, self.encoder.owners)
        self._link, self.scales = link, tuned.scales
        self._check(link, data[sample].target, tuned, self._totals[sample])
        self._posterior, self._errors = condition(data, self.scales), float(np.mean(data.errors))

    def _tuned(self, log: bool, sample: Integers, stderr: Floats) -> tuple[float, Link, Data, Tuned]:
        """Likelihood of the values under a link, the link, what it makes of the trials, and its scales."""
        values, totals = self._values, self._totals
        link = Link.of(values, totals, log, self.table is not None)
        inputs = self._inputs(self._codes, totals, link)
        data = Data(inputs, link.target(values, totals), link.errors(values, stderr))
        tuned = tune(data[sample], self.kind)
        return tuned.likelihood + link.volume(values[sample]), link, data, tuned

    def _check(self, link: Link, target: Floats, tuned: Tuned, totals: Floats) -> None:
        """How well left-out trials were predicted: the factor of deviations, and the order."""
        if len(target) > 2:
            self.factor = std_factor((target - tuned.mean) / tuned.std)
        prior = link.prior(totals)
        order = rank_correlations(prior + link.unit * tuned.mean, prior + link.unit * target)
        self.cross_validated = order[1]

    # --- predicting ---------------------------------------------------------------------------------------

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        """Median and standard deviation of a measurement, shape ``[candidates]``, in the metric's unit.

        Raises:
            SpaceError: a candidate is not in the space.
        """
        return self._predicted(self.encoder.rows(candidates))

    def _predicted(self, codes: Floats) -> Prediction:
        totals = self.encoder.totals(codes)
        inputs = self._inputs(codes, totals, self._link)
        if self._posterior is None:
            whitened = inputs.whitened(self.scales)
            mean, variance = np.zeros(len(codes)), np.sum(whitened**2, axis=1) + self.scales.smooth**2
        else:
            mean, variance = self._posterior.predict(inputs)
        variance = np.maximum(variance, 0.0) + self.scales.noise**2 + self._errors
        middle = self._link.prior(totals) + self._link.unit * mean
        deviation = self.factor * self._link.unit * np.sqrt(variance)
        noise = self._link.unit * math.sqrt(self._errors)
        if self._link.log:
            found = log_normal(middle, deviation)
            return Prediction(found.mean, found.std, noise * found.mean)
        floor = 1e-12 * (1.0 + np.abs(middle))
        return Prediction(middle, np.nan_to_num(deviation, nan=1e6) + floor, np.full(len(middle), noise))

    def _inputs(self, codes: Floats, totals: Floats, link: Link) -> Inputs:
        line = np.zeros((len(codes), 2))
        line[:, 0] = 1.0
        divisor = np.ones(len(codes))
        if link.relative:
            line[:, 1] = link.stretch * (link.prior(totals) - link.center)
            divisor = np.maximum(np.abs(totals), 1e-300) if link.log else divisor * link.unit
        places = self.encoder.places(codes) if self.kind == "gp" else np.zeros((len(codes), 0))
        return Inputs(line, self.encoder.effects(codes, divisor), self.encoder.curves(codes), places)

    # --- the learned table --------------------------------------------------------------------------------

    def corrected(
        self, rng: np.random.Generator | None = None, around: Candidate | None = None
    ) -> AdditiveTable:
        """The table with every entry corrected by its effects: their posterior mean, or one posterior
        sample when ``rng`` is given (Thompson sampling). Costs that were positive stay so, and the whole is
        scaled so that totals match the measured trials in the median.

        With ``around`` it is the best table near that candidate: its total there is the prediction, and the
        curves are in it as straight lines, so that an option may cost more because many have it already.

        Raises:
            ValueError: there is no table to correct.
            SpaceError: ``around`` is not in the space.
        """
        if self.table is None:
            raise ValueError("this predictor has no table to correct")
        layout, weights = self.encoder.layout, self._weights(rng)
        effects = np.append(self.scales.effect * weights[2 : 2 + layout.size], 0.0)
        old = self.encoder.costs
        listed = np.array([n in self.table.costs for n, _ in layout.entries], bool) & np.isfinite(old)
        moved = _moved(old, self.encoder.scales, effects[layout.levels].sum(axis=1))
        moved, base = np.where(listed, moved, old), self.table.base
        if around is not None:
            moved, base = self._local(moved, weights, self.encoder.codes(around)[None])
        elif self._link.log and len(self._values):
            totals = base + moved[self.encoder.chosen(self._codes)].sum(axis=1)
            scale = float(np.median(self._values / totals))
            moved, base = scale * moved, scale * base
        costs: dict[str, dict[Value, float]] = {}
        for (name, option), cost, there in zip(layout.entries, moved, listed, strict=True):
            if there:
                costs.setdefault(name, {})[option] = float(cost)
        return AdditiveTable(self.metric, base, costs)

    def _local(self, moved: Floats, weights: Floats, codes: Floats) -> tuple[Floats, float]:
        """Costs and base of the table near one candidate ``codes [1, decisions]``."""
        assert self.table is not None
        chosen, base = self.encoder.chosen(codes)[0], self.table.base
        value = self._link.unit
        if self._link.log:
            value = float(self._predicted(codes).mean[0])
            scale = value / float(base + moved[chosen].sum())
            moved, base = scale * moved, scale * base
        slopes = self.encoder.curve_slopes(codes[0], self.scales.curve * weights[self._line_and_effects :])
        return moved + value * slopes, base - value * float(slopes[chosen].sum())

    @property
    def _line_and_effects(self) -> int:
        """Weights before those of the curves."""
        return 2 + self.encoder.size + 3 * sum(i is not None for i in self.encoder.layout.intervals)

    def _weights(self, rng: np.random.Generator | None) -> Floats:
        """Whitened weights: posterior mean or a sample; of the prior before a fit."""
        if self._posterior is not None:
            return self._posterior.weights(rng)
        size = self._line_and_effects
        return np.zeros(size) if rng is None else rng.standard_normal(size)


def _moved(costs: Floats, scales: Floats, effects: Floats) -> Floats:
    """Costs after their relative errors; to first order ``cost + scale * effects``, but never past zero."""
    relative = np.clip(effects, -2.0, 2.0)
    # An entry at the floor has nothing to scale, so the error is added.
    added = costs + scales * relative
    added = np.where(costs >= 0, np.maximum(added, 0.05 * costs), np.minimum(added, 0.05 * costs))
    scaled = costs * np.exp(np.where(costs > 0, relative, -relative))
    return np.asarray(np.where(np.abs(costs) < scales, added, scaled))
