"""Which rows belong to a share of all rows: validation documents, held-out prompts, samples.

A hash of the row's content decides. So a row keeps its side when files are shuffled, joined or cut
in another way, and equal rows are never on both sides:

    hash of the content    0 .................. share * 2^64 .................. 2^64
    the row is                  in the share                 not in the share
"""

import hashlib


def in_share(content: str, share: float, seed: str = "") -> bool:
    """Whether the row with this content belongs to a share of all rows.

    share: from 0 to 1. A larger share holds all rows of a smaller one
    seed: another seed gives another choice, independent of the first

    >>> [in_share(text, 0.5) for text in ("春", "夏", "秋", "冬")]
    [True, False, True, True]
    """
    # "surrogatepass": JSON may spell half of a surrogate pair, which UTF-8 cannot encode.
    salted = f"{seed}{content}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(salted, digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
