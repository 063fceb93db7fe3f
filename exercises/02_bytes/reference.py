from nanophi.tokenizer.levels import ByteLevel, byte_characters

symbols = ByteLevel().symbols
bytes_of = ByteLevel().bytes_of

__all__ = ["byte_characters", "bytes_of", "symbols"]
