"""k-NN attention for any PyTorch model: `torch.compile(model, backend="kvt")`.

Every softmax(Q Kᵀ) V of a model is found, however it is spelled, and rewritten so that each query attends to its k
highest-scoring keys (KVT, arXiv 2106.00515).
"""

import kvt_compile.parallel.registration  # noqa: F401 - rules for DTensors
from kvt_compile.adjust import options, set_topk
from kvt_compile.adjust_select import set_select
from kvt_compile.backend import RefusalError
from kvt_compile.backends import inductor_pass, passes_for
from kvt_compile.calibration import CalibratedPolicy, CalibratedSelection, CalibrationError, calibrate
from kvt_compile.capture.capture import CaptureError
from kvt_compile.config import OptionError, Options
from kvt_compile.explain import explain
from kvt_compile.functional import attention, topk_attention
from kvt_compile.look import visualize
from kvt_compile.report.report import Report
from kvt_compile.rewrite import RewriteResult, rewrite
from kvt_compile.select import SelectionError
from kvt_compile.verification import Verification, VerificationError, verify

__all__ = [
    "CalibratedPolicy",
    "CalibratedSelection",
    "CalibrationError",
    "CaptureError",
    "OptionError",
    "Options",
    "RefusalError",
    "Report",
    "RewriteResult",
    "SelectionError",
    "Verification",
    "VerificationError",
    "attention",
    "calibrate",
    "explain",
    "inductor_pass",
    "options",
    "passes_for",
    "rewrite",
    "set_select",
    "set_topk",
    "topk_attention",
    "verify",
    "visualize",
]
