"""Rotary embedding: q . k of two equal vectors by their distance."""

import torch

from docs.draw import BLUE, GREEN, ORANGE
from nanophi.model.phi import rotary_tables, rotate

DISTANCES = 128
ROTATED = (8, 32)  # dimensions: those of the small model, and of the released one


def data() -> dict:
    positions = torch.arange(DISTANCES)[None]
    curves = {}
    for rotated in ROTATED:
        cos, sin = rotary_tables(positions, rotated, 10000.0)
        turned = rotate(torch.ones(1, DISTANCES, 1, rotated), cos, sin)[0, :, 0]
        curves[str(rotated)] = [round(x, 3) for x in (turned @ turned[0] / rotated).tolist()]
    cos, _ = rotary_tables(positions, 8, 10000.0)
    pairs = cos[0, :, 0].t().tolist()
    return {"mean": curves, "pairs": [[round(x, 3) for x in pair] for pair in pairs[:3]]}


def draw(figure, data: dict) -> None:
    left, right = figure.subplots(1, 2)
    for number, (pair, colour) in enumerate(zip(data["pairs"], (BLUE, ORANGE, GREEN), strict=True)):
        left.plot(pair, color=colour, label=f"i = {number}", linewidth=1)
    left.set_ylabel("one pair")
    for (rotated, curve), colour in zip(data["mean"].items(), (BLUE, ORANGE), strict=True):
        right.plot(curve, color=colour, label=f"R = {rotated}")
    right.set_ylabel("mean of all R / 2 pairs")
    for axes in (left, right):
        axes.set_xlabel("distance m - n")
        axes.set_ylim(-1.05, 1.05)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
