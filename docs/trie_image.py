"""Draws docs/images/trie.png, the picture of method.md: a trie of five answers, and the targets at each prefix.

python docs/trie_image.py [FILE.png]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from cft_jax.distributions import OutputSpace
from cft_jax.evaluate.report.plots import AFTER, INK, MUTED, TARGET, new_figure, png
from cft_jax.text import Trie, build_trie, terminator_id
from cft_jax.text.scratch import train_tokenizer

SPACE = OutputSpace(("1", "2", "3", "10", "12"), np.array([0.2, 0.3, 0.1, 0.15, 0.25]))
END = "end"
_COLUMN, _ROW = 2.6, 1.0
_ON_LINE: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9}


def main(path: Path) -> None:
    """Writes the picture."""
    tokenizer = train_tokenizer(SPACE.values)
    trie = build_trie(tokenizer, SPACE, terminator_id(tokenizer, "tokenizer_eos"))
    names = {int(token): tokenizer.decode([int(token)]) for token in trie.child_ids}
    names[trie.terminator_id] = END
    figure, axes = new_figure(8.6, 3.9, 1, 2)
    draw_trie(axes[0], trie, names)
    draw_targets(axes[1], trie, names)
    path.write_bytes(png(figure, 160))


def texts(trie: Trie, names: dict[int, str]) -> list[str]:
    """The text of each prefix."""
    found = [""]
    for token, parent in zip(trie.token[1:], trie.parent[1:], strict=True):
        found.append(found[parent] + names[int(token)])
    return found


def edges(trie: Trie, prefix: int) -> list[tuple[int, float, int]]:
    """Token, probability and the prefix it leads to (-1: the end), of each child of a prefix."""
    span = slice(int(trie.child_offsets[prefix]), int(trie.child_offsets[prefix + 1]))
    arrays = (trie.child_ids[span], trie.child_probs[span], trie.child_prefix[span])
    return [(int(token), float(p), int(child)) for token, p, child in zip(*arrays, strict=True)]


def draw_trie(ax: Axes, trie: Trie, names: dict[int, str]) -> None:
    """The tree, the empty prefix on the left; answers, with their probabilities, where a path ends."""
    texts_of, heights, rows = texts(trie, names), {}, iter(range(100))

    def place(prefix: int) -> float:
        children = [(-next(rows) if child < 0 else place(child)) for _, _, child in edges(trie, prefix)]
        heights[prefix] = float(np.mean(children))
        for (token, p, child), y in zip(edges(trie, prefix), children, strict=True):
            start, end = (int(trie.depth[prefix]) * _COLUMN, heights[prefix]), (trie.depth[prefix] + 1) * _COLUMN
            ax.plot([start[0], end], [start[1], y], color=AFTER, linewidth=0.6 + 5 * p, alpha=0.55, zorder=1)
            label = f"{names[token]}  {p:.2f}"
            ax.text(
                (start[0] + end) / 2,
                (start[1] + y) / 2,
                label,
                ha="center",
                va="center",
                color=INK,
                fontsize=8,
                bbox=_ON_LINE,
            )
            if child < 0:
                mass = trie.reach[prefix] * p
                ax.text(end + 0.15, y, f'"{texts_of[prefix]}"  {mass:.2f}', va="center", color=MUTED, fontsize=8.5)
        return heights[prefix]

    place(0)
    for prefix, y in heights.items():
        shown = f'"{texts_of[prefix]}"' if prefix else "start"
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": MUTED, "linewidth": 0.8}
        ax.text(
            trie.depth[prefix] * _COLUMN,
            y,
            shown,
            ha="center",
            va="center",
            fontsize=8.5,
            color=INK,
            bbox=box,
            zorder=2,
        )
    ax.set_xlim(-0.6, 3 * _COLUMN + 1.6)
    ax.set_title("the answers as paths of tokens", fontsize=10, color=INK)
    ax.set_axis_off()


def draw_targets(ax: Axes, trie: Trie, names: dict[int, str]) -> None:
    """For every prefix a row of bars: how probable each next token is to be."""
    tokens = sorted(names, key=lambda token: (token == trie.terminator_id, names[token]))
    texts_of = texts(trie, names)
    for row, text in enumerate(texts_of):
        ax.axhline(-row * _ROW, color=TARGET, linewidth=0.7)
        for token, p, _ in edges(trie, row):
            column = tokens.index(token)
            ax.bar(column, 0.65 * p, 0.7, bottom=-row * _ROW, color=AFTER)
            ax.text(
                column, -row * _ROW + 0.65 * p + 0.03, f"{p:.2f}", ha="center", va="bottom", fontsize=7.5, color=INK
            )
        ax.text(
            -0.75, -row * _ROW + 0.2, f'after "{text}"' if text else "at the start", ha="right", fontsize=8.5, color=INK
        )
    ax.set_xticks(range(len(tokens)), [names[token] for token in tokens])
    ax.set_xlim(-2.6, len(tokens) - 0.4)
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.set_title("the targets: the next token's distribution", fontsize=10, color=INK)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "trie.png")
