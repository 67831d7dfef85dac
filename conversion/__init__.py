from .comparing import VerificationError
from .convert import convert, write
from .options import ConversionOptions
from .plan import plan
from .recipe import Recipe
from .strategies import STRATEGIES, ConversionStrategy, Promise, StrategyOptions, register_strategy
from .verify import Verification, keep_figures, verify


__all__ = [
    "STRATEGIES",
    "ConversionOptions",
    "ConversionStrategy",
    "Promise",
    "Recipe",
    "StrategyOptions",
    "Verification",
    "VerificationError",
    "convert",
    "keep_figures",
    "plan",
    "register_strategy",
    "verify",
    "write",
]
