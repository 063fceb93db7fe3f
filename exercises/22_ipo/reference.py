from nanophi.train import losses


def ipo_loss(chosen, rejected, beta=0.1):
    return losses.ipo_loss(chosen, rejected, losses.PreferenceOptions(beta))


def ipo_gradients(chosen, rejected, beta=0.1):
    # The library leaves this to autograd.
    slope = 2 * (chosen - rejected - 1 / (2 * beta))
    return slope, -slope


__all__ = ["ipo_gradients", "ipo_loss"]
