from .convert import convert
from .verify import Verification, VerificationError, keep_figures, verify


__all__ = ["Verification", "VerificationError", "convert", "keep_figures", "verify"]
