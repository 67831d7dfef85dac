from .configuration_mhmoe import MHMoEConfig


__all__ = ["MHMoEConfig"]
