from .card import put_section, write_model_card


__all__ = ["put_section", "write_model_card"]
