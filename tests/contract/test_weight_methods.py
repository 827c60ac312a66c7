"""Every registered way of merging weights keeps what `interfuse.testing` promises, with chance and trims too."""

from __future__ import annotations

from typing import Any

import pytest

from interfuse import testing
from interfuse.registry import methods
from interfuse.testing import WeightClaims

NOT_EQUAL: dict[str, Any] = {"equal": False}

#: Where a method's documentation says something else than most: its options, and what doesn't hold with them.
CLAIMS: dict[str, list[WeightClaims]] = {
    "ema": [WeightClaims({"decay": 0.5}, symmetric=False)],
    "expo": [WeightClaims(**NOT_EQUAL), WeightClaims({"alpha": 0.0})],
    "lines": [WeightClaims({"alpha": 1.0, "beta": 0.0}), WeightClaims({"alpha": 0.5, "beta": 0.5}, **NOT_EQUAL)],
    "slerp": [WeightClaims({"t": 0.5}, **NOT_EQUAL), WeightClaims({"t": 1.0})],
    "nuslerp": [WeightClaims(), WeightClaims({"nuslerp_flatten": False})],
    "model_stock": [WeightClaims(), WeightClaims({"filter_wise": True})],
    "ties": [
        WeightClaims(),
        WeightClaims({"density": 0.4, "rescale": True}, **NOT_EQUAL),
        WeightClaims({"density": 0.4, "trim": "global"}, **NOT_EQUAL),
    ],
    "dare_linear": [WeightClaims(), WeightClaims({"density": 0.5}, **NOT_EQUAL)],
    "dare_ties": [WeightClaims(), WeightClaims({"density": 0.5, "rescale": "l1"}, **NOT_EQUAL)],
    "della": [WeightClaims(), WeightClaims({"density": 0.5}, **NOT_EQUAL)],
    "della_linear": [WeightClaims(), WeightClaims({"density": 0.5, "rescale": "l1"}, **NOT_EQUAL)],
    "breadcrumbs": [WeightClaims(), WeightClaims({"density": 0.5, "gamma": 0.1}, **NOT_EQUAL)],
    "breadcrumbs_ties": [WeightClaims(), WeightClaims({"density": 0.5, "gamma": 0.1}, **NOT_EQUAL)],
    "sce": [WeightClaims(), WeightClaims({"select_topk": 0.5}, **NOT_EQUAL)],
    "nearswap": [WeightClaims({"t": 100.0}, in_unit=("t",)), WeightClaims({"t": 0.1}, in_unit=("t",), **NOT_EQUAL)],
    "ram": [WeightClaims({"epsilon": 1e-3}, in_unit=("epsilon",))],
    "ramplus_tl": [WeightClaims({"epsilon": 1e-3}, in_unit=("epsilon",))],
    "pcb": [WeightClaims(unit=False, **NOT_EQUAL)],
    "arcee_fusion": [WeightClaims(unit=False, **NOT_EQUAL)],
    "knots": [WeightClaims({"density": 1.0}), WeightClaims({"combine": "dare_ties"}, **NOT_EQUAL)],
    "wudi": [WeightClaims(), WeightClaims({"solver": "descent", "steps": 5}, unit=False, **NOT_EQUAL)],
    "tsv_m": [WeightClaims(**NOT_EQUAL)],
    "iso_c": [WeightClaims(**NOT_EQUAL)],
    "iso_cts": [WeightClaims(**NOT_EQUAL)],
    "subspace_boost": [WeightClaims(**NOT_EQUAL), WeightClaims({"leading_share": 1.0})],
    "star": [WeightClaims(**NOT_EQUAL), WeightClaims({"kept_share": 1.0})],
}
DATA_FREE = [method for method in methods("weights") if "data" not in method.needs]
CASES = [(m.name, claims) for m in DATA_FREE for claims in CLAIMS.get(m.name, [WeightClaims()])]


def shown(value: Any) -> str:
    if isinstance(value, WeightClaims):
        return ",".join(f"{key}={option}" for key, option in value.options.items()) or "plain"
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize("check", testing.WEIGHT_CHECKS, ids=shown)
@pytest.mark.parametrize(("name", "claims"), CASES, ids=shown)
def test_every_method_keeps_its_promises(name: str, claims: WeightClaims, check: testing.WeightCheck) -> None:
    check(name, claims)
