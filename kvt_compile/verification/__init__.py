"""Whether k-NN attention with every key is the dense model: a model and inputs -> a verdict for each attention."""

from kvt_compile.verification.facts import Difference, SiteCheck
from kvt_compile.verification.outcome import VerificationError
from kvt_compile.verification.verify import Verification, verify

__all__ = ["Difference", "SiteCheck", "Verification", "VerificationError", "verify"]
