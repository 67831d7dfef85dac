from mhmoe.configuration.configuration_mhmoe import *  # noqa: F403  on saving, the canonical file takes this one's place
