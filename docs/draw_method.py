"""Draw docs/method.svg, the picture of the method in the README: `python3 docs/draw_method.py`.

Coordinates are pixels of a page 850 wide, counted from the lower left corner.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

WIDTH, HEIGHT = 850, 430
DPI = 100
INK, MUTED, BLUE, ORANGE, GREEN = "#1f2328", "#57606a", "#0b5cad", "#b35900", "#1a7f37"
LIGHT = {INK: "#f6f8fa", BLUE: "#e7f1fb", ORANGE: "#fdf0e2", GREEN: "#e6f6ea"}
Point = tuple[float, float]


def draw_box(axes: Axes, left: float, bottom: float, width: float, height: float, title: str, lines: tuple[str, ...],
             color: str = INK) -> None:
    """A rounded box: a bold title, and lines of text below it, all centred."""
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=7", linewidth=1.3,
                                  edgecolor=color, facecolor=LIGHT[color]))
    count, step = 1 + len(lines), 18
    top = bottom + height / 2 + step * (count - 1) / 2
    axes.text(left + width / 2, top, title, color=color, fontsize=9.5, fontweight="bold", ha="center", va="center")
    for number, line in enumerate(lines, start=1):
        axes.text(left + width / 2, top - number * step, line, color=INK, fontsize=9, ha="center", va="center")


def draw_arrow(axes: Axes, start: Point, end: Point, color: str = MUTED, bend: str = "arc3") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, linewidth=1.4, color=color,
                                   connectionstyle=bend, shrinkA=0, shrinkB=0))


def draw_label(axes: Axes, x: float, y: float, text: str, color: str = MUTED, align: str = "center") -> None:
    axes.text(x, y, text, color=color, fontsize=8.5, ha=align, va="center")


def draw_step(axes: Axes, left: float, number: str, command: str, effect: str, color: str) -> None:
    """The number of a command, the command, and what it does."""
    axes.text(left + 11, 226, number, color="white", fontsize=10, fontweight="bold", ha="center", va="center_baseline",
              bbox={"boxstyle": "circle,pad=0.25", "facecolor": color, "edgecolor": color})
    axes.text(left + 30, 235, command, color=INK, fontsize=8.5, family="monospace", va="center")
    draw_label(axes, left + 30, 217, effect, align="left")


def draw_session(axes: Axes) -> None:
    """The upper half: impressions of a session, and what each is in the Markov decision process."""
    axes.text(20, 410, "A logged session is a Markov decision process", color=INK, fontsize=11, fontweight="bold",
              va="center")
    for row, (name, meaning) in enumerate((("state", "features of an impression"),
                                           ("action", "predictions, one a task"),
                                           ("reward", "how well they fit the label y"))):
        y = 368 - 40 * row
        axes.text(20, y + 8, name, color=INK, fontsize=9.5, fontweight="bold", va="center")
        draw_label(axes, 20, y - 9, meaning, align="left")
    for column, time in enumerate(("t", "t+1", "t+2")):
        x = 230 + 195 * column
        draw_box(axes, x, 349, 140, 36, rf"$s_{{{time}}}$", ())
        axes.text(x + 70, 328, rf"$a_{{{time}}}$ = (CTR, CTCVR)", color=BLUE, fontsize=9.5, ha="center", va="center")
        axes.text(x + 70, 288, rf"$r_{{{time}}} = -\mathrm{{BCE}}(a_{{{time}}},\, y_{{{time}}})$", color=ORANGE,
                  fontsize=9.5, ha="center", va="center")
        draw_arrow(axes, (x + 140, 367), (x + 193, 367))
    axes.text(819, 367, "…", color=MUTED, fontsize=11, ha="center", va="center")


def draw_training(axes: Axes) -> None:
    """The lower half: the model acts, critics learn from the replay buffer, their weights enter the loss."""
    axes.plot([20, 830], [256, 256], color="#d0d7de", linewidth=1)
    draw_step(axes, 20, "1", "python3 SLmain.py", "trains the model", BLUE)
    draw_step(axes, 250, "2", "python3 RLmain.py", "learns one critic a task, offline", ORANGE)
    draw_step(axes, 585, "3", "python3 SLmain.py --polish=1", "fine-tunes with the weights", GREEN)

    draw_box(axes, 20, 96, 160, 96, "Multi-task model", ("is the actor:", r"$a_k = p(y_k = 1 \mid s)$"), BLUE)
    draw_box(axes, 250, 96, 115, 96, "Replay buffer", (r"$(s,\, a,\, r,\, s')$",), ORANGE)
    draw_box(axes, 408, 147, 134, 45, "Critic of CTR", (r"$Q_1(s, a_1)$",), ORANGE)
    draw_box(axes, 408, 96, 134, 45, "Critic of CTCVR", (r"$Q_2(s, a_2)$",), ORANGE)
    draw_box(axes, 585, 96, 245, 96, "Weights", (r"$w_k = 1 - \lambda\, Q_k(s, a_k)$", "one a sample and task $k$"),
             GREEN)
    draw_box(axes, 250, 14, 580, 50, "Weighted loss",
             (r"mean over samples and tasks of $w_k \cdot \mathrm{BCE}(a_k,\, y_k)$",), GREEN)

    draw_arrow(axes, (180, 144), (248, 144))
    draw_label(axes, 214, 160, "actions")
    draw_arrow(axes, (365, 157), (406, 169))
    draw_arrow(axes, (365, 131), (406, 119))
    draw_arrow(axes, (542, 169), (583, 157))
    draw_arrow(axes, (542, 119), (583, 131))
    draw_arrow(axes, (707, 96), (707, 66))
    axes.plot([250, 100], [39, 39], color=MUTED, linewidth=1.4, solid_capstyle="butt")
    draw_arrow(axes, (100, 39), (100, 94))
    draw_label(axes, 175, 51, "gradient")


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    draw_session(axes)
    draw_training(axes)
    return figure


if __name__ == "__main__":
    with matplotlib.rc_context({"svg.hashsalt": "method"}):  # the same bytes every time
        draw().savefig(Path(__file__).with_name("method.svg"), metadata={"Date": None})
