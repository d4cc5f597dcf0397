"""From the name of a spec to the spec, with the calibration that it needs."""

from __future__ import annotations

from pathlib import Path

from kvcomp.calibration.file import DEFAULT_LEVEL, Calibration
from kvcomp.errors import InvalidInput
from kvcomp.spec import CALIBRATED, CALIBRATED_CODINGS, CodecSpec, is_calibrated


def resolve(
    spec: str | Path | CodecSpec, calibration: Calibration | str | Path | None = None
) -> tuple[CodecSpec, Calibration | None]:
    """Resolve a spec, and the calibration it needs if it needs one.

    Parameters
    ----------
    spec
        As for ``CodecSpec.resolve``, or ``kvcomp-klt`` or ``packed-klt``, alone or with ``:LEVEL``.
    calibration
        One, or the path of its file.

    Raises
    ------
    InvalidInput
        If the calibration is missing, not needed or another one, or if there is no such spec or level.
    CorruptData, UnsupportedVersion, LimitExceeded
        As for ``Calibration.read``.
    """
    resolved = None if is_calibrated(spec) else CodecSpec.resolve(spec)
    if resolved is not None and resolved.calibration is None:
        if calibration is not None:
            raise InvalidInput(f"the spec {spec!s} needs no calibration: leave it out, or use {CALIBRATED}")
        return resolved, None
    if calibration is None:
        which = "" if resolved is None else f" with the fingerprint {resolved.calibration}"
        raise InvalidInput(
            f"{CALIBRATED} needs a calibration of the model{which}: give "
            "calibration=kvcomp.calibrate(model, tokenizer=tokenizer), or the file that "
            "'kvcomp calibrate MODEL -o model.kvcal' makes"
        )
    read = calibration if isinstance(calibration, Calibration) else Calibration.read(calibration)
    if resolved is None:
        name, _, level = str(spec).partition(":")
        return read.spec(level or DEFAULT_LEVEL, CALIBRATED_CODINGS[name]), read
    read.levels_of(resolved)
    return resolved, read
