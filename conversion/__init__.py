from .convert import convert
from .verify import VerificationError, verify


__all__ = ["VerificationError", "convert", "verify"]
