from nanophi.train import optim


def orthogonalize(matrix):
    return optim.orthogonalize(matrix[None])[0]  # the library takes many matrices of one shape


__all__ = ["orthogonalize"]
