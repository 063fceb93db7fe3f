import torch

from nanophi.files import replacing

# nanophi.train.rundir does the same for a whole directory, and checks what it reads.


def save_state(path, model, optimizers, step):
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": torch.get_rng_state(),
        "step": step,
    }
    with replacing(path) as beside:
        torch.save(state, beside)


def load_state(path, model, optimizers):
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"])
    return state["step"]


__all__ = ["load_state", "save_state"]
