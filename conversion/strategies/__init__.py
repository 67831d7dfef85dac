"""
The ways from dense FFNs to MH-MoE layers, by name. What the commands offer, check, print and write on cards derives
from `STRATEGIES`; code outside this package adds a strategy of its own with [`register_strategy`].
"""

from .anchored import Anchored
from .calibrated import Calibrated
from .exact import Exact
from .random import Random
from .strategy import ConversionStrategy, Promise, StrategyOptions


STRATEGIES: dict[str, type[ConversionStrategy]] = {}


def register_strategy(strategy: type[ConversionStrategy]) -> type[ConversionStrategy]:
    """
    Offer `strategy` under its name; usable as a decorator of the class.

    Raises:
        ValueError: there is another one of that name.
        TypeError: it does not say what a strategy must say of itself.
    """
    if missing := [field for field in ("name", "summary", "promise", "untrained") if not hasattr(strategy, field)]:
        raise TypeError(f"{strategy.__name__} has no {', '.join(missing)}; see ConversionStrategy")
    if STRATEGIES.setdefault(strategy.name, strategy) is not strategy:
        raise ValueError(f"there is a strategy {strategy.name!r} already: {STRATEGIES[strategy.name].__name__}")
    return strategy


for _strategy in (Exact, Anchored, Calibrated, Random):
    register_strategy(_strategy)


def table() -> str:
    """The strategies and what they promise, in Markdown."""
    rows = [f"| `{name}` | {of.summary} | {of.promise.in_short} |" for name, of in STRATEGIES.items()]
    return "\n".join(["| strategy | what becomes of the dense FFN | promise |", "|---|---|---|", *rows])


__all__ = ["STRATEGIES", "ConversionStrategy", "Promise", "StrategyOptions", "register_strategy", "table"]
