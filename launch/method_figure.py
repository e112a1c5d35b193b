"""Draws the picture of the method at the top of README.md: python launch/method_figure.py [FILE]."""

import sys

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from tap_jax.evaluation import drawing

# Blocks from the encoders up to the decoders, with the colour of each kind, and what one client of three tasks owns.
BLOCKS = (
    ("image encoder", drawing.SKY),
    ("text encoder", drawing.GREEN),
    ("experts, images", drawing.SKY),
    ("experts, text", drawing.GREEN),
    ("decoder, task 1", drawing.ORANGE),
    ("decoder, task 2", drawing.PURPLE),
    ("decoder, task 3", drawing.BLUE),
)
OWNED = (1, 3, 4, 5)
TAKEN = (1, 3, 4)  # the blocks of task 1
WIDE, HIGH, STEP, BOTTOM = 11.0, 2.6, 3.6, 5.5
INK, FAINT = "#333333", "#BBBBBB"


def main() -> None:
    out = sys.argv[1] if len(sys.argv) > 1 else "launch/figures/method.png"
    with drawing.style():
        figure, ((axis,),) = drawing.new_figure(1, 1, width=10.6, height=4.1)
        axis.set(xlim=(0, 106), ylim=(0, 41))
        axis.set_axis_off()
        _panel(axis, 0, 22, "Server")
        _panel(axis, 30, 43, "Stage 1, a client $c_i$ in each round it takes part in")
        _panel(axis, 76, 30, "Stage 2, after the last round")

        _model(axis, 7.5, range(len(BLOCKS)), "$\\widetilde{W}$", names=True)
        _model(axis, 35, OWNED, "$\\widetilde{W}_{[i]}$, federated")
        _model(axis, 58, OWNED, "$X_{[i]}$, personal", taken=TAKEN)
        _model(axis, 78, OWNED, "$\\widetilde{W}_{[i]}$, teacher")
        _model(axis, 93, OWNED, "$X_{[i]}$, student")

        _arrow(axis, (18.2, 28.6), (33.8, 28.6), "its tasks'\nblocks", above=True)
        _arrow(axis, (33.8, 11.5), (18.2, 11.5), "mean over\nowners", above=False)
        for block in TAKEN:
            _arrow(axis, (46.7, _height(block)), (57.3, _height(block)))
        axis.text(52, _height(5) + 4.3, "where\n$h^{(l)} + m < h^{(p)}$", ha="center", va="center", fontsize=8.5)
        axis.text(52, _height(1) - 3.2, "takes the\ntask's blocks", ha="center", va="center", fontsize=8.5)
        axis.text(40.5, 3.4, "trains: losses $h^{(l)}$", ha="center", va="center", fontsize=8.5)
        axis.text(63.5, 3.4, "trains: losses $h^{(p)}$", ha="center", va="center", fontsize=8.5)
        _arrow(axis, (89.6, 20.5), (92.4, 20.5))
        axis.text(91, 23.4, "KL", ha="center", va="center", fontsize=8.5)
        axis.text(91, 3.4, "task losses + $\\beta\\,$KL of the outputs", ha="center", va="center", fontsize=8.5)
        with open(out, "wb") as file:
            file.write(drawing.png(figure))


def _height(block: int) -> float:
    return BOTTOM + STEP * block + HIGH / 2


def _panel(axis, left: float, width: float, title: str) -> None:
    style = "round,pad=0,rounding_size=1.2"
    axis.add_patch(FancyBboxPatch((left, 0.3), width, 36, boxstyle=style, facecolor="#F6F7F8", edgecolor=FAINT))
    axis.text(left + width / 2, 38.8, title, ha="center", va="center", fontsize=10, color=INK)


def _model(axis, left: float, owned, title: str, *, names: bool = False, taken=()) -> None:
    """A column of blocks; those that are not owned are outlines, those taken over have a bold rim."""
    wide = WIDE + names
    for block, (name, color) in enumerate(BLOCKS):
        corner = (left - (names * 3), BOTTOM + STEP * block)
        size = (wide + names * 2.5, HIGH)
        if block in owned:
            rim = {"edgecolor": INK, "linewidth": 1.6} if block in taken else {"edgecolor": "white", "linewidth": 0.5}
            axis.add_patch(Rectangle(corner, *size, facecolor=color, alpha=0.9, **rim))
        else:
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=FAINT, linestyle=":", linewidth=0.8))
        if names:
            middle = corner[0] + size[0] / 2
            axis.text(middle, _height(block), name, ha="center", va="center", fontsize=7.5, color="black")
    middle = left - names * 3 + (wide + names * 2.5) / 2
    axis.text(middle, BOTTOM + STEP * len(BLOCKS) + 1.8, title, ha="center", va="center", fontsize=9.5)


def _arrow(axis, start, end, text: str = "", *, above: bool = True) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.2))
    if text:
        middle = ((start[0] + end[0]) / 2, start[1] + (1 if above else -1))
        axis.text(*middle, text, ha="center", va="bottom" if above else "top", fontsize=8.5)


if __name__ == "__main__":
    main()
