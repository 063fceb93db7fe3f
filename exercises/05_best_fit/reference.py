import nanophi
from nanophi.train import packing


def pieces(lengths, context):
    documents = [[0] * length for length in lengths]
    packed = nanophi.Packed(documents, context, batch_rows=1, seed=0)
    columns = packed.piece_document, packed.piece_start, packed.piece_length
    return list(zip(*(column.tolist() for column in columns), strict=True))


def best_fit(lengths, capacity):
    return packing.best_fit(lengths, capacity).tolist()
