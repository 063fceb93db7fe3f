"""Exercise 8: rotary position embedding of a part of each head.

B batch, T time, H heads, K head_dim, R rotated dimensions
"""

from torch import Tensor


def rotary_tables(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles position * theta^(-2i/R), for i = 0 ... R/2 - 1.

    positions (B or 1, T) -> two tensors (B or 1, T, 1, R/2) in fp32.

        rotary_tables(torch.tensor([[0, 3]]), rotary_dim=4, theta=10000.0)
            angles    0 0    at position 0
                      3 0.03 at position 3
    """
    raise NotImplementedError("write rotary_tables")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head; the rest passes through. x (B, T, H, K).

    cos, sin: as `rotary_tables` gives them; R is twice their last dimension. The dimensions i and
    i + R/2 are the coordinates of a point, which turns by the angle i of its position: (a, b)
    becomes (a cos - b sin, b cos + a sin). The result has the type of x, fp64 or bf16.

        R = 4, K = 5    dimensions 0 1 2 3 4    points (0, 2) and (1, 3); 4 passes through
    """
    raise NotImplementedError("write rotate")
