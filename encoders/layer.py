from mhmoe.modeling_mhmoe.layer import *  # noqa: F403  on saving, the canonical file takes this one's place
