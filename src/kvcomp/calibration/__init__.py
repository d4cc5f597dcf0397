"""What kvcomp-klt knows of a model: transforms, steps and codebooks, in one file."""

from kvcomp.calibration.content import CLASSES, MAX_SHIFT, About, LevelOfLayer
from kvcomp.calibration.file import Calibration, LayerCalibration
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
