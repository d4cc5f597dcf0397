"""The model that most tests of the integrations run."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from tiny_models import tiny_model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model()
