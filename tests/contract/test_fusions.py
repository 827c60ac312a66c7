"""Every registered fusion keeps what `interfuse.testing` promises, and computes its formula."""

from __future__ import annotations

import pytest

from interfuse import testing
from interfuse.registry import Method, methods

#: Where a method's documentation says something else than most.
CLAIMS = {
    "attention": testing.Claims(unequal_tokens=True),
    "gate": testing.Claims(shares=False),
    "concat": testing.Claims(idle=("missing",)),
    "transformer": testing.Claims(unequal_tokens=True, idle=("missing",)),
}


@pytest.mark.parametrize("check", testing.FUSION_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", methods("features"), ids=lambda method: method.name)
def test_every_fusion_keeps_its_promises(method: Method, check: testing.Check) -> None:
    check(method.name, CLAIMS.get(method.name, testing.Claims()))
