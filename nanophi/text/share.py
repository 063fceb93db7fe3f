"""Which rows belong to a share of all rows: validation documents, held-out prompts, samples."""

import hashlib


def in_share(content: str, share: float, seed: str = "") -> bool:
    """Whether a row belongs to a share of all rows: depends on its content and the seed, not on its place."""
    digest = hashlib.blake2b(
        f"{seed}{content}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") < share * 2**64
