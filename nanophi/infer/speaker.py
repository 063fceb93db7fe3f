r"""Tokens become text, piece by piece, up to a stop string.

A token may end within a character: 好 is the three bytes e5 a5 bd, and a tokenizer that did not
learn 好 spells it with two or three tokens. The bytes of an unfinished character wait for the rest:

>>> utf8 = codecs.getincrementaldecoder("utf-8")("replace")
>>> [utf8.decode(token) for token in (b"\xe5", b"\xa5\xbd", b"\xef\xbc\x81")]
['', '好', '！']
"""

import codecs
from collections.abc import Mapping


class Speaker:
    """Tokens -> text, in whole characters, up to a stop string.

    Text that may be the beginning of a stop string is held back until that is known.

    >>> speaker = Speaker({1: b"ab", 2: b"##", 3: b"c"}, stop=("##end",))
    >>> [speaker.say(token) for token in (1, 2, 3)]
    ['ab', '', '##c']
    """

    def __init__(self, bytes_of: Mapping[int, bytes], stop: tuple[str, ...] = ()):
        self.bytes_of = bytes_of
        self.stop = tuple(text for text in stop if text)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False

    def say(self, token: int) -> str:
        """The text that is certain after one more token; `stopped` tells whether it is the last."""
        # The model may have more rows than there are tokens; such an id spells nothing.
        self.held += self.utf8.decode(self.bytes_of.get(token, b""))
        ends = [end for end in (self.held.find(text) for text in self.stop) if end >= 0]
        if ends:
            self.stopped = True
            said, self.held = self.held[: min(ends)], ""
            return said
        keep = max((self._overlap(text) for text in self.stop), default=0)
        certain = len(self.held) - keep
        said, self.held = self.held[:certain], self.held[certain:]
        return said

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of `held` begin the stop string."""
        longest = min(len(stop) - 1, len(self.held))
        for size in range(longest, 0, -1):
            if stop.startswith(self.held[-size:]):
                return size
        return 0

    def rest(self) -> str:
        """What was held back, when no more tokens come; a character cut in half is left out."""
        said, self.held = self.held, ""
        return said
