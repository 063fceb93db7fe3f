"""`encode_chat` does this with the segments of messages, `Packed` with the rows of a batch."""

from nanophi.train.packing import IGNORE


def encode_segments(segments, tok):
    ids = []
    mask = []
    for segment in segments:
        new = [tok.special_id(segment.text)] if segment.special else tok.encode(segment.text)
        ids += new
        mask += [segment.learned] * len(new)
    return ids, mask


def inputs_and_targets(ids, mask):
    pairs = zip(ids[1:], mask[1:], strict=True)
    targets = [token if is_learned else IGNORE for token, is_learned in pairs]
    return ids[:-1], targets
