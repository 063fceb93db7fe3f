"""What an H100 can compute, by the FLOPs that each byte from memory is used for."""

from docs.draw import BLUE, GREY, ORANGE

SIZE = (7, 3.3)
FLOPS, BYTES = 989e12, 3.35e12  # a second: dense bf16, memory
WIDTH, INNER = 768, 4096  # of the 0.2B preset


def of_product(rows: int) -> float:
    """FLOPs per byte of a product (rows, WIDTH) x (WIDTH, INNER) in bf16."""
    moved = 2 * (rows * WIDTH + WIDTH * INNER + rows * INNER)
    return 2 * rows * WIDTH * INNER / moved


def data() -> dict:
    work = {f"{rows:,}": of_product(rows) for rows in (1, 16, 128, 1024, 16384)}
    points = {
        name: {"flops_per_byte": x, "tflops": min(FLOPS, BYTES * x) / 1e12}
        for name, x in work.items()
    }
    return {"ridge": FLOPS / BYTES, "peak": FLOPS / 1e12, "tb_per_s": BYTES / 1e12} | {
        "points": points
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    ridge, peak = data["ridge"], data["peak"]
    left, right = 0.3, 3000
    axes.plot([left, ridge, right], [data["tb_per_s"] * left, peak, peak], color=BLUE)
    axes.axvline(ridge, color=GREY, linewidth=1, linestyle=":")
    axes.text(ridge * 1.08, 1.6, f"{ridge:.0f} FLOP/byte", color=GREY)
    for name, point in data["points"].items():
        axes.plot(point["flops_per_byte"], point["tflops"], "o", color=ORANGE)
        x, y = point["flops_per_byte"], point["tflops"]
        where = {"1,024": ((4, -16), "left"), "16,384": ((0, 7), "left")}
        offset, side = where.get(name, ((9, -4), "left"))
        axes.annotate(
            f"{name} rows" if name != "1" else "1 row",
            (x, y),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(1, 3000)
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("TFLOP/s at most")
