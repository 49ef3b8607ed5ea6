"""Settings for every test: one torch thread per process, one Hypothesis profile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from cq.core import catalog

settings.register_profile(
    "cq",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("cq")
torch.set_num_threads(1)


@pytest.fixture
def fresh_catalog() -> Iterator[None]:
    """The plug table is found anew in this test, and again after it."""
    catalog._found.cache_clear()
    yield
    catalog._found.cache_clear()
