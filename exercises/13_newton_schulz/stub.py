"""Exercise 13: Newton-Schulz, the heart of Muon."""

from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c
STEPS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix (A, B) near 1; their directions stay.

    1. Divide the matrix by its Frobenius norm, the root of the sum of all squares. A matrix of
       zeros stays zeros.
    2. STEPS times: x -> a x + b (x x^T) x + c (x x^T)^2 x. No other function than products is
       needed, and no SVD.
    3. x x^T has as many rows as x. Of a tall matrix (A > B), take the transpose before step 2 and
       after it.

    Returns a new matrix of the same dtype; the argument stays as it is.
    """
    raise NotImplementedError("write orthogonalize")
