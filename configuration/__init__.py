from .configuration_mhmoe import MHMoEConfig
from .costs import Costs, costs


__all__ = ["Costs", "MHMoEConfig", "costs"]
