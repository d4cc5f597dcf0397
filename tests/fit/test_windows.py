"""What a model writes for its calibration: it begins as it knows to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from kvcomp.fit.windows import write

WORDS, NAMED = 200, 7


class Repeats:
    """A model that repeats one token for ever after texts that begin in one of two ways; else it says anything."""

    def __init__(self, after_named: bool) -> None:
        self.after_named = after_named
        self.device = torch.device("cpu")
        self.config = LlamaConfig(vocab_size=WORDS, num_hidden_layers=1, bos_token_id=NAMED)
        self.stuck: Tensor | None = None

    def __call__(self, ids: Tensor, past_key_values: Any) -> Any:
        if past_key_values.get_seq_length() == 0:
            self.stuck = (ids == NAMED) == self.after_named
        past_key_values.update(*torch.zeros(2, len(ids), 1, 1, 8), 0)
        assert self.stuck is not None
        again = torch.nn.functional.one_hot(ids, WORDS) * 100.0
        return SimpleNamespace(logits=torch.where(self.stuck[..., None], again, 0.0))


@pytest.mark.parametrize("after_named", [True, False])
def test_a_text_begins_so_that_it_does_not_repeat_itself(after_named: bool) -> None:
    text = np.arange(50, 60)
    written = write(Repeats(after_named), text, 24, 40, lambda *_: None)
    assert written.shape == (24, 40)
    assert len(np.unique(written[:, 1:])) == WORDS
    assert np.isin(written[:, 0], text if after_named else [NAMED]).all()


def test_without_a_text_the_model_begins_with_its_first_token() -> None:
    assert (write(Repeats(True), None, 24, 40, lambda *_: None) == NAMED).all()


def test_what_is_written_is_the_same_again() -> None:
    first, second = (write(Repeats(True), np.arange(9), 5, 9, lambda *_: None) for _ in range(2))
    assert np.array_equal(first, second)
