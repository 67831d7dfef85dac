from .convert import convert
from .verify import Verification, VerificationError, verify


__all__ = ["Verification", "VerificationError", "convert", "verify"]
