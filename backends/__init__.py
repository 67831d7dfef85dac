from .interface import NAME, register, subtoken_experts_forward


__all__ = ["NAME", "register", "subtoken_experts_forward"]
