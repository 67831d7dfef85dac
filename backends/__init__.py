from .cpu.memory import release as release_memory
from .interface import NAME, register, subtoken_experts_forward


register()  # here: transformers' experts may be imported from within this package first

__all__ = ["NAME", "register", "release_memory", "subtoken_experts_forward"]
