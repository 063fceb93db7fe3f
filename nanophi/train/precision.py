"""The dtype that a run computes in. Weights, gradients and optimizer states are always fp32."""

import torch

from nanophi.model.backends import has_bf16

# The usual first scale is 65,536, for a mean loss. Here the loss is a sum over tokens, 2,048 or so.
FIRST_SCALE = 32.0
GROW_AFTER = 1000  # finite steps in a row


def compute_dtype(dtype: str, device: str) -> str:
    """ "float32", "bfloat16" or "float16": the one that --dtype names, or for "auto" the one that
    suits the device.
    """
    if dtype != "auto":
        return dtype
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if has_bf16(device) else "float16"


def autocast(dtype: str, device: str, cache: bool) -> torch.autocast:
    """The context in which forward passes compute in `dtype`; it does nothing for "float32".

    cache: keep the half-precision copies of the weights until the context ends. One forward pass
    has no use for them.
    """
    half = dtype != "float32"
    return torch.autocast(
        device.split(":")[0], getattr(torch, dtype), enabled=half, cache_enabled=cache
    )


class LossScale:
    """By how much the loss is multiplied before backward (Micikevicius et al. 2018, section 3.2).

    fp16 knows no number between 0 and 6e-8, and gradients are often smaller. The scale halves when
    a gradient overflows, and doubles after GROW_AFTER finite steps. In other dtypes it stays 1:

        32, 32, overflow -> 16, 16, ... (1,000 finite steps) -> 32
    """

    def __init__(self, dtype: str):
        self.changes = dtype == "float16"
        self.value = FIRST_SCALE if self.changes else 1.0
        self.unbroken = 0  # finite steps since the last change

    def update(self, finite: bool) -> None:
        """Adjust the scale after a step. finite: its loss and gradient were finite."""
        self.unbroken = self.unbroken + 1 if finite else 0
        if not self.changes:
            return
        if not finite:
            self.value /= 2
        elif self.unbroken == GROW_AFTER:
            self.value *= 2
            self.unbroken = 0
