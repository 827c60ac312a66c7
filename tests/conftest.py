"""What every test has: a cache folder of its own, with kernels that are compiled once for all, and no hub.

The suite runs side by side (`make test` takes a worker a core), so torch and BLAS take one thread each, alone too: tests see
the same machine however they are run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch and numpy load, which is later; children inherit it

# What a busy machine or a loop's first compilation takes isn't a failure.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take what `tests/golden` finds now for what it should find."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden's files anew")


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from the user's cache and from the network."""
    cache: Path = tmp_path_factory.mktemp("cache")
    base: Path = tmp_path_factory.getbasetemp()
    kernels = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"  # a worker's is within the run's
    kernels.mkdir(exist_ok=True)
    (cache / "interfuse").mkdir()
    (cache / "interfuse" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def proofs() -> None:
    """Outputs that changed their names, shapes or config are loaded by transformers, which takes seconds to import."""


@pytest.fixture(autouse=True)
def _without_proofs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare other tests those seconds."""
    if "proofs" not in request.fixturenames:
        monkeypatch.setattr("interfuse.engine.output.proof.available", lambda: False)
