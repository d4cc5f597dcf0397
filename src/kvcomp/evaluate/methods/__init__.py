"""Ways to hold a KV cache, each behind the interface of ``method.py``, and how a command's option names one."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcomp.calibration import Calibration
from kvcomp.errors import InvalidInput
from kvcomp.evaluate.gguf_file import folder_of
from kvcomp.evaluate.methods.baseline import Baseline, Parts
from kvcomp.evaluate.methods.fp8 import Fp8
from kvcomp.evaluate.methods.kivi import Kivi
from kvcomp.evaluate.methods.kvcomp import KVComp
from kvcomp.evaluate.methods.method import Method, Pair
from kvcomp.evaluate.methods.quantized_cache import Quantized
from kvcomp.evaluate.methods.turboquant import TurboQuant
from kvcomp.evaluate.methods.uncompressed import Uncompressed
from kvcomp.evaluate.models import TUNED_SPEC, calibration_beside, spec_for
from kvcomp.spec import CALIBRATED, PRESETS, is_calibrated

__all__ = ["BASELINES", "Baseline", "KVComp", "Method", "Pair", "Parts", "baseline", "default_specs", "named_spec"]

BASELINES: dict[str, Callable[[], Method]] = {
    "uncompressed": Uncompressed,
    "fp8": Fp8,
    **{f"kivi-{bits}": lambda bits=bits: Kivi(bits) for bits in (4, 3, 2)},  # type: ignore[misc]
    **{f"kivi-{bits}-same-raw": lambda bits=bits: Kivi(bits, raw=PRESETS["kvcomp"]) for bits in (4, 3, 2)},  # type: ignore[misc]
    **{f"turboquant-{bits}": lambda bits=bits: TurboQuant(bits) for bits in (4, 3, 2)},  # type: ignore[misc]
    **{f"hqq-{bits}": lambda bits=bits: Quantized("hqq", bits) for bits in (4, 2)},  # type: ignore[misc]
    **{f"quanto-{bits}": lambda bits=bits: Quantized("quanto", bits) for bits in (4, 2)},  # type: ignore[misc]
}


def baseline(name: str) -> Method:
    """The baseline of this name, or the one in a Python file: ``mine.py``, or ``mine.py:Halves`` if it has several.

    Raises InvalidInput if there is none.
    """
    if name in BASELINES:
        return BASELINES[name]()
    match = re.fullmatch(r"(.+\.py)(?::(\w+))?", name)
    if match is None:
        raise InvalidInput(f"no baseline {name!r}: use {', '.join(BASELINES)} or the path of a .py file with your own")
    return _from_file(Path(match[1]), match[2])


def named_spec(
    model: str | Path, name: str, calibration: Calibration | Path | None = None, backend: str = "cpu"
) -> Method:
    """kvcomp under a spec that an option names, its calibration given or beside the model. Raises InvalidInput."""
    spec, read = spec_for(model, name, calibration)
    stem = Path(name).stem
    return KVComp(spec, name if stem in PRESETS or is_calibrated(name) else stem, read, backend)


def default_specs(model: str | Path, backend: str = "cpu") -> list[Method]:
    """kvcomp as a model would use it: calibrated and tuned, if that was done for it, and the preset."""
    found: list[Method] = []
    tuned = folder_of(model) / TUNED_SPEC
    if calibration_beside(model):
        found.append(named_spec(model, CALIBRATED, backend=backend))
    if tuned.is_file():
        found.append(KVComp(tuned, "tuned", backend=backend))
    return [*found, KVComp("kvcomp", backend=backend)]


def _from_file(path: Path, wanted: str | None) -> Method:
    spec = importlib.util.spec_from_file_location(f"kvcomp_baseline_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"the baseline file {path} is not Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise InvalidInput(f"the baseline file {path} does not run: {type(error).__name__}: {error}") from error
    found: dict[str, Any] = {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, Method) and kind.__module__ == module.__name__
    }
    chosen = [found[wanted]] if wanted in found else list(found.values()) if wanted is None else []
    if len(chosen) != 1:
        which = f"no class {wanted}" if wanted else f"{len(found)} subclasses of Baseline or Method"
        there = f" ({', '.join(found)}): name one as {path}:NAME" if found else ": write one"
        raise InvalidInput(f"{path} has {which}{there}")
    try:
        made: Method = chosen[0]()
    except TypeError as error:
        raise InvalidInput(f"the baseline in {path} cannot be made: {error}") from None
    return made
