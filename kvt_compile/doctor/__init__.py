"""What this machine can do: `examine()` -> `Diagnosis`, for `kvt doctor` and for bug reports."""

from kvt_compile.doctor.diagnosis import Check, Diagnosis, examine

__all__ = ["Check", "Diagnosis", "examine"]
