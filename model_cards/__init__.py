from .card import converted_card
from .source import SourceCard, is_hub_id, read_source_card


__all__ = ["SourceCard", "converted_card", "is_hub_id", "read_source_card"]
