"""Choose k by measurement: a model and sample inputs -> a k per attention that meets a budget on inputs not seen."""

from kvt_compile.calibration.calibrate import calibrate
from kvt_compile.calibration.data import CalibrationError
from kvt_compile.calibration.policy import CalibratedPolicy

__all__ = ["CalibratedPolicy", "CalibrationError", "calibrate"]
