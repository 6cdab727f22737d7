"""A predictor that learns the order of candidates whose decisions form a sequence (sampling schedules).

What a step does depends on its neighbours, and a table of single decisions can't say so. Networks read the
slots in their order and learn which of two candidates is better (OMS-DPM, arXiv 2306.08860; USF, arXiv
2312.07243). Scores become values by a line through the trials that each network did not see, which also says
how far off it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from autocomp.predictors.additive import AdditivePredictor
from autocomp.predictors.around import learnable
from autocomp.predictors.audit import rank_correlations
from autocomp.predictors.base import Prediction, log_normal
from autocomp.predictors.ranking_net import Networks, Training, train
from autocomp.predictors.sequence import SequenceEncoder, Sequences, Traits
from autocomp.space import AdditiveTable, Candidate, SearchSpace
from autocomp.trial import Trial

Floats = NDArray[np.float64]

ENOUGH = 8
"""Fewer trials than this train no network: the prior answers alone."""
LONGEST = 512
"""Of more slots than this no network is trained: minutes, for what few trials can say of so many."""


class RankingPredictor:
    """Learns one metric by the order of trials, with uncertainty from the networks' disagreement.

    Args:
        metric: what to predict.
        table: additive prior, or ``None``: then the mean of the trials.
        space: decisions of the candidates; those of one block are a slot, slots are read in order.
        training: sizes of the networks and how they are trained.
        traits: further features of a candidate (``Problem.traits``).

    Attributes:
        cross_validated: Kendall's tau of the predictions of trials that their network did not see; NaN before
            a network was trained.
    """

    def __init__(
        self,
        metric: str,
        table: AdditiveTable | None,
        space: SearchSpace,
        training: Training | None = None,
        traits: Traits | None = None,
    ) -> None:
        self.metric, self.table, self.space = metric, table, space
        self.training = training or Training()
        self.encoder = SequenceEncoder(space, traits)
        self._reset()

    def _reset(self) -> None:
        self.cross_validated = math.nan
        self._base = None if self.table is None else AdditivePredictor(self.table)
        self._networks: Networks | None = None
        self._log, self._center, self._unit = False, 0.0, 1.0
        self._line = (0.0, 1.0)
        self._error, self._doubt = 1.0, 1.0

    # --- fitting --------------------------------------------------------------------------------------------

    def fit(self, trials: Sequence[Trial]) -> Self:
        """Forget what was learned and learn from ``trials``; failed, NaN and foreign ones are ignored.

        The result depends on the set of trials and the seed, not on their order.
        """
        self._reset()
        used = learnable(trials, self.metric, self.encoder, self.table)
        if self._base is not None:
            self._base.fit(used)
        if not used:
            return self
        values = np.array([t.value(self.metric) for t in used])
        self._log = bool(np.all(values > 0))
        y = np.log(values) if self._log else values
        self._center, spread = float(y.mean()), float(y.std())
        self._unit = spread or 0.1 * abs(self._center) or 1.0
        if len(used) >= ENOUGH and spread > 0 and len(self.encoder.blocks) <= LONGEST:
            noise = np.nan_to_num([t.stderr(self.metric) for t in used]) / (values if self._log else 1.0)
            self._train([t.candidate for t in used], (y - self._center) / self._unit, noise / self._unit)
        return self

    def _train(self, candidates: Sequence[Candidate], y: Floats, noise: Floats) -> None:
        """Networks, each of which leaves out one part of the trials; then what their scores are worth."""
        how, rng = self.training, np.random.default_rng(self.training.seed)
        parts = rng.permutation(len(y)) % how.members
        data, prior = self.encoder(candidates), self._prior(candidates)
        self._networks = train(data, y, noise, prior, parts, how)
        scores = self._networks(data, prior)
        unseen = scores[parts, np.arange(len(y))]
        self.cross_validated = rank_correlations(unseen, y)[1]
        self._line = _line(unseen, y)
        self._error = float(np.sqrt(np.mean((_on(self._line, unseen) - y) ** 2))) + 1e-9
        self._doubt = float(np.mean(_on(self._line, scores).var(axis=0))) + 1e-12

    def _prior(self, candidates: Sequence[Candidate]) -> Floats:
        """What the table says, in units of the target; zeros without one."""
        if self._base is None:
            return np.zeros(len(candidates))
        values = self._base.predict(candidates).mean
        y = np.log(np.maximum(values, 1e-300)) if self._log else values
        return (y - self._center) / self._unit

    # --- predicting -----------------------------------------------------------------------------------------

    def predict(self, candidates: Sequence[Candidate]) -> Prediction:
        """Median and standard deviation of a measurement, shape ``[candidates]``, in the metric's unit.

        Raises:
            SpaceError: a candidate is not in the space.
        """
        data = self.encoder(candidates)
        if self._networks is None and self._base is not None:
            return self._base.predict(candidates)
        middle, deviation = self._scored(candidates, data)
        middle, deviation = self._center + self._unit * middle, self._unit * deviation
        return log_normal(middle, deviation) if self._log else Prediction(middle, deviation)

    def _scored(self, candidates: Sequence[Candidate], data: Sequences) -> tuple[Floats, Floats]:
        """Mean and deviation in units of the target.

        Half of the variance that was seen on left-out trials is taken to be everywhere, half to follow the
        disagreement of the members.
        """
        if self._networks is None or not len(candidates):
            return np.zeros(len(candidates)), np.ones(len(candidates))
        found = _on(self._line, self._networks(data, self._prior(candidates)))
        share = 0.5 + 0.5 * found.var(axis=0) / self._doubt
        return found.mean(axis=0), self._error * np.sqrt(share)


def _line(scores: Floats, y: Floats) -> tuple[float, float]:
    """Offset and slope of the least squares line; the slope never turns the order round."""
    centred = scores - scores.mean()
    slope = float(centred @ y) / max(float(centred @ centred), 1e-12)
    slope = max(slope, 0.05)
    return float(y.mean()) - slope * float(scores.mean()), slope


def _on(line: tuple[float, float], scores: Floats) -> Floats:
    return np.asarray(line[0] + line[1] * scores)
