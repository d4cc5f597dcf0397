"""Engines of a real vLLM, each in a process of its own, in the Python that ``KVCOMP_VLLM`` names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from kvcomp.errors import InvalidInput, KVCompError

ROOT = Path(__file__).parents[1]
WORKER = "kvcomp.integrations.vllm.worker.KVCompWorker"
END = 20_000  # characters of a log that an error shows


def fine(scale: float) -> dict[str, Any]:
    """A spec of this relative scale, as JSON."""
    return {
        "kvcomp_spec": 1,
        "key": {"unit": "channel", "relative_scale": scale},
        "value": {"unit": "token", "relative_scale": scale},
    }


# Nats between log probabilities. The first spec has more levels than a code can say, so that its blocks are raw: what
# is seen is whether each token lies where it should. The second has coded blocks. On random tokens it differs by up to
# .23 from the uncompressed cache in transformers; a wrong page differs by several nats.
EXACT, EXACT_CLOSE = fine(0.005), 0.1
CODED, CODED_CLOSE = fine(0.008), 0.5


class EngineFailed(KVCompError):
    """An engine that ended. The message is the end of its log."""


class Engine:
    """An engine; its methods are the functions of vllm_engine.py.

    Parameters
    ----------
    live
        Options of the compressed cache; None for vLLM's own.
    apart
        Whether the engine's core has a process of its own, as vLLM has it by default; its memory is not seen then.
    arguments
        Of ``vllm.LLM``.

    Raises
    ------
    InvalidInput
        Without ``KVCOMP_VLLM``.
    EngineFailed
        If it does not start, or ends in a call.
    """

    def __init__(self, live: dict[str, Any] | None, apart: bool = False, **arguments: Any) -> None:
        python = os.environ.get("KVCOMP_VLLM")
        if not python:
            raise InvalidInput("KVCOMP_VLLM must name a Python that has vLLM: use make bench-vllm or make test-vllm")
        self.live = live is not None
        if live is not None:
            arguments = {"worker_cls": WORKER, "additional_config": {"kvcomp": live}, **arguments}
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(apart)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "NUMBA_CACHE_DIR": str(Path(python).parents[1] / "numba"),  # its Numba may be another version
        }
        read, write = os.pipe()
        with ExitStack() as files:
            self._answers = files.enter_context(os.fdopen(read))
            self._log = files.enter_context(tempfile.TemporaryFile("w+"))
            self._process = subprocess.Popen(
                [python, Path(__file__).parent / "vllm_engine.py", str(write)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                text=True,
            )
            os.close(write)
            self._files = files.pop_all()
        self._ask(arguments)

    def __call__(self, call: str, **arguments: Any) -> Any:
        """What a function of vllm_engine.py returns."""
        return self._ask({"call": call, **arguments})

    def state(self) -> dict[str, Any]:
        """Memory and metrics."""
        found: dict[str, Any] = self("state", live=self.live)
        return found

    @property
    def tokens(self) -> int:
        """What vLLM's log says that its cache holds."""
        found = re.search(r"KV cache size: ([0-9,]+) tokens", self.log)
        assert found is not None
        return int(found[1].replace(",", ""))

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            log = self.log
            self.close()
            raise EngineFailed(log[-END:])
        return json.loads(answer)


def same(one: dict[str, Any], other: dict[str, Any], close: float) -> bool:
    """Whether two answers agree: in log probabilities of the likeliest tokens, up to where they choose between ties.

    close: nats that log probabilities may differ by.
    """
    for ours, theirs, mine, yours in zip(one["top"], other["top"], one["ids"], other["ids"], strict=True):
        likely = sorted(theirs, key=theirs.__getitem__)[-5:]
        if not set(likely) <= set(ours) or max(abs(ours[token] - theirs[token]) for token in likely) >= close:
            return False
        if mine != yours:
            return bool(abs(theirs[str(mine)] - theirs[str(yours)]) < 2 * close)
    return True
