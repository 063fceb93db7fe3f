from nanophi.tokenizer.levels import byte_characters

# One with 4 bytes, a family of 5 code points, a letter with a separate accent, and bytes that are
# no printable character.
TEXTS = [
    "",
    "月亮为什么有时圆，有时弯？",
    "🌕",
    "👨\u200d👩\u200d👧",
    "e\u0301",
    "a b\n\t\x00\x7f\xa0\xad",
]


def test_each_byte_has_a_character_of_its_own_that_one_can_see(mine):
    found = mine.byte_characters()
    assert len(found) == 256, f"there are 256 bytes, your list has {len(found)} entries"
    assert len(set(found)) == 256, f"two bytes share a character: only {len(set(found))} differ"
    for byte, char in enumerate(found):
        is_seen = len(char) == 1 and char.isprintable() and not char.isspace()
        assert is_seen, f"byte 0x{byte:02X} is {char!r}, which nobody sees in a file"


def test_the_characters_are_those_of_gpt2(mine):
    found = mine.byte_characters()
    for byte, expected in enumerate(byte_characters()):
        char = found[byte]
        assert char == expected, f"byte 0x{byte:02X}: expected {expected!r}, yours is {char!r}"


def test_these_texts_survive(mine):
    for text in TEXTS:
        survives(mine, text)


def test_any_text_survives(mine):
    """hypothesis invents texts, and looks for the shortest one that fails."""
    try:
        from hypothesis import given, settings
        from hypothesis.strategies import text
    except ModuleNotFoundError:
        raise AssertionError("this test needs hypothesis: pip install hypothesis") from None

    @settings(max_examples=100, derandomize=True, database=None, deadline=None)
    @given(text())
    def each(invented):
        survives(mine, invented)

    each()


def survives(mine, text):
    shown = mine.symbols(text)
    raw = text.encode()
    assert len(shown) == len(raw), f"{text!r} has {len(raw)} bytes, {len(shown)} characters came"
    back = mine.bytes_of(shown)
    assert back == raw, f"{text!r} has the bytes {raw!r}, {back!r} came back"


def test_half_a_character_has_bytes_too(mine):
    """A token may end in the middle of a character."""
    raw = "月🌕".encode()
    shown = mine.symbols("月🌕")
    for cut in range(len(raw) + 1):
        found = mine.bytes_of(shown[:cut])
        assert found == raw[:cut], f"{shown[:cut]!r} stands for {raw[:cut]!r}, {found!r} came"
