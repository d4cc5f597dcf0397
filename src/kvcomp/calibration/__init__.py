"""What kvcomp-klt knows of a model: transforms, steps and codebooks, in one file."""

from kvcomp.calibration.file import (
    CLASSES,
    LEVELS,
    PRESET,
    About,
    Calibration,
    LayerCalibration,
    LevelOfLayer,
    quantise_matrix,
    resolve,
)

__all__ = [
    "CLASSES",
    "LEVELS",
    "PRESET",
    "About",
    "Calibration",
    "LayerCalibration",
    "LevelOfLayer",
    "quantise_matrix",
    "resolve",
]
