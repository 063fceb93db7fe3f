from nanophi.model.phi import rotary_tables, rotate

__all__ = ["rotary_tables", "rotate"]
