"""The needle grid as a picture: lengths across, depths down, exact answers as colour and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#f9dcb8", "#9ecae8")  # of the pages: none and all; black on them has a contrast of 10 to 1 and more


def draw_heatmap(result: dict[str, Any], path: Path) -> None:
    """Write a PNG of a needle result, one panel per language."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("found", COLOURS)
    grids = result["grid"]
    lengths, depths = result["lengths"], result["depths"]
    width = max(4.0, 1.1 * len(lengths) + 2)
    size = (width * len(grids), max(2.6, 0.5 * len(depths) + 1.6))
    fig, axes = plt.subplots(1, len(grids), figsize=size, layout="constrained", squeeze=False)
    for ax, (language, grid) in zip(axes[0], grids.items(), strict=True):
        image = ax.imshow(grid, cmap=shades, vmin=0, vmax=100, aspect="auto")
        ax.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
        ax.set_yticks(range(len(depths)), [f"{100 * d:g}%" for d in depths])
        ax.set(xlabel="prompt, tokens", ylabel="depth", title=f"needle, {language}: exact answers, %")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                ax.text(x, y, f"{value:.0f}", ha="center", va="center", color="black", fontsize=9)
    fig.colorbar(image, ax=axes[0], shrink=0.9)
    model, trials = Path(result["model"].rpartition(" + ")[2]).name, result["settings"]["trials"]
    told = f"{model}, {trials} questions per cell, {result['date']}"
    fig.suptitle(told, fontsize=9, parse_math=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
