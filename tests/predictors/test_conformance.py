"""Every built-in predictor passes the checks that third-party ones are offered."""

from __future__ import annotations

import pytest

from autocomp.predictors.additive import AdditivePredictor
from autocomp.predictors.boosted import BoostedPredictor
from autocomp.predictors.choose import BestOf
from autocomp.predictors.ranking import RankingPredictor
from autocomp.predictors.ranking_net import Training
from autocomp.predictors.residual import ResidualPredictor
from autocomp.predictors.trees import TreesPredictor
from autocomp.testing.predictors import CHECKS, Check, Factory

FAST = Training(members=3, width=16, epochs=80)
FACTORIES: dict[str, Factory] = {
    "additive": lambda metric, table, space: AdditivePredictor(table),
    "ridge": lambda metric, table, space: ResidualPredictor(metric, table, space, "ridge"),
    "gp": lambda metric, table, space: ResidualPredictor(metric, table, space, "gp"),
    "ridge-without-table": lambda metric, table, space: ResidualPredictor(metric, None, space, "ridge"),
    "gp-without-table": lambda metric, table, space: ResidualPredictor(metric, None, space, "gp"),
    "ranking": lambda metric, table, space: RankingPredictor(metric, table, space, FAST),
    "ranking-without-table": lambda metric, table, space: RankingPredictor(metric, None, space, FAST),
    "trees": lambda metric, table, space: TreesPredictor(metric, table, space),
    "trees-without-table": lambda metric, table, space: TreesPredictor(metric, None, space),
    "boosted": lambda metric, table, space: BoostedPredictor(metric, table, space, rounds=40),
    "boosted-without-table": lambda metric, table, space: BoostedPredictor(metric, None, space, rounds=40),
    "best": lambda metric, table, space: BestOf(
        metric,
        {
            "ridge": ResidualPredictor(metric, table, space),
            "ranking": RankingPredictor(metric, table, space, FAST),
        },
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_builtin_predictors(name: str, check: Check) -> None:
    check(FACTORIES[name])
