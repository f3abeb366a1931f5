"""Tiny models to steer, one of each family by name."""

from pathlib import Path
from typing import Any

import pytest

from tests.steering_rows import rows, steering_files, view  # noqa: F401


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Any:
    from tests.tiny_models import tiny_lm

    return tiny_lm(request.param, tiny_model_dir)


@pytest.fixture(scope="session")
def llama(tiny_model_dir: Path) -> Any:
    from tests.tiny_models import tiny_lm

    return tiny_lm("llama", tiny_model_dir)
