"""Exercise 2: text as bytes, and each byte as a character that one can see."""


def byte_characters() -> list[str]:
    """GPT-2's stand-in character for each byte value: a list of 256 different characters.

    A byte that is a printable character of Latin-1 (! to ~, ¡ to ¬, ® to ÿ) stands for itself. The
    other 68 bytes get the characters from U+0100 on, in the order of their values.

        byte_characters()[0x41]  ->  "A"
        byte_characters()[0x20]  ->  "Ġ"      the space, U+0120
    """
    raise NotImplementedError("write byte_characters")


def symbols(text: str) -> str:
    """The UTF-8 bytes of a text, one stand-in character for each byte.

    A character of three bytes becomes three of them:

        symbols("月")  ->  "æľĪ"      the bytes E6 9C 88
    """
    raise NotImplementedError("write symbols")


def bytes_of(characters: str) -> bytes:
    """The bytes that stand-in characters stand for.

    They may end inside of a character of the text, as a token may:

        bytes_of("æľĪ")  ->  b"\\xe6\\x9c\\x88"
        bytes_of("æľ")   ->  b"\\xe6\\x9c"
    """
    raise NotImplementedError("write bytes_of")
