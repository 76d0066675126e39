"""Choose by measurement: a model and sample inputs -> a k, or a selection, per attention that meets a budget on inputs
not seen."""

from kvt_compile.calibration.calibrate import calibrate
from kvt_compile.calibration.data import CalibrationError
from kvt_compile.calibration.policy import CalibratedPolicy
from kvt_compile.calibration.selection_policy import CalibratedSelection

__all__ = ["CalibratedPolicy", "CalibratedSelection", "CalibrationError", "calibrate"]
