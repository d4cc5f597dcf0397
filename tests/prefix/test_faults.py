"""Values and answers of a store that are wrong in every way: what is loaded is right, bit by bit, or nothing."""

from __future__ import annotations

from pathlib import Path

from faults import ANSWERS, DAMAGE, block
from redis_server import running


def test_a_thousand_faults_give_no_wrong_tensor() -> None:
    found = block(1, None, 0)
    assert {kind for kind, _ in found} == {kind.__name__ for kind in (*DAMAGE, *ANSWERS)}
    assert {outcome for _, outcome in found} >= {"miss", "shorter", "StoreUnavailable"}
    assert found.total() == 1000


def test_faults_in_a_real_redis(tmp_path: Path) -> None:
    with running(tmp_path) as url:
        assert block(2, url, 0, 200).total() == 200
