from nanophi import dpo_loss


def dpo_gradients(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    # The library leaves this to autograd.
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    weight = beta * (-beta * margin).sigmoid()
    return -weight, weight, weight, -weight


__all__ = ["dpo_gradients", "dpo_loss"]
