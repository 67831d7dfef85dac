from .configuration_mhmoe import ExpertsType, MHMoEConfig, RouterType
from .costs import Costs, costs
from .presets import PRESETS, from_preset, parse_overrides


# attached here, since the class's own file travels to the Hub and the presets stay
MHMoEConfig.from_preset = classmethod(from_preset)  # ty: ignore[invalid-assignment]: bound when it is looked up
MHMoEConfig.register_for_auto_class()  # makes save_pretrained copy the class's file, for machines without this package

__all__ = ["PRESETS", "Costs", "ExpertsType", "MHMoEConfig", "RouterType", "costs", "parse_overrides"]
