"""What kvcomp-klt knows of a model: transforms, steps and codebooks, in one file."""

from kvcomp.calibration.file import (
    CLASSES,
    MAX_SHIFT,
    About,
    Calibration,
    LayerCalibration,
    LevelOfLayer,
)
from kvcomp.calibration.named import resolve
from kvcomp.calibration.transform import quantise_matrix

__all__ = [
    "CLASSES",
    "MAX_SHIFT",
    "About",
    "Calibration",
    "LayerCalibration",
    "LevelOfLayer",
    "quantise_matrix",
    "resolve",
]
