from nanophi.model.attention import manual, same_document

attention = manual

__all__ = ["attention", "same_document"]
