from .comparing import VerificationError
from .convert import convert, write
from .layout_plan import LayoutOptions, plan_layouts
from .options import ConversionOptions
from .plan import plan
from .recipe import Recipe
from .strategies import STRATEGIES, ConversionStrategy, Promise, StrategyOptions, register_strategy
from .verify import Verification, keep_figures, verify


__all__ = [
    "STRATEGIES",
    "ConversionOptions",
    "ConversionStrategy",
    "LayoutOptions",
    "Promise",
    "Recipe",
    "StrategyOptions",
    "Verification",
    "VerificationError",
    "convert",
    "keep_figures",
    "plan",
    "plan_layouts",
    "register_strategy",
    "verify",
    "write",
]
