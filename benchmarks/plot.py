"""Draws the engine benchmark: decode rate against batch size, one panel a model, as SVG."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN, LEGEND = 520, 360, 56, 230
_OURS = ("#c0392b", "#e67e22", "#b8860b", "#8e44ad", "#d35400")
_PEERS = ("#1f4e79", "#2e86c1", "#7fb3d5", "#1e8449", "#52be80", "#5d6d7e", "#aab7b8")
_TICKS = 5


def write(models: Mapping[str, Any], path: Path) -> None:
    """Write the SVG file ``path`` for the ``models`` of the benchmark's figures."""
    panels = [_panel(name, model) for name, model in models.items() if model["engines"]]
    width, height = WIDTH + LEGEND, HEIGHT * max(1, len(panels))
    moved = [
        f'<g transform="translate(0,{HEIGHT * index})">{panel}</g>'
        for index, panel in enumerate(panels)
    ]
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(moved)}</svg>\n'
    )


def _panel(name: str, model: Mapping[str, Any]) -> str:
    batches = list(model["experts_hit"])
    series = {
        engine: [found["decode"].get(batch, {}).get("tokens_per_s") for batch in batches]
        for engine, found in model["engines"].items()
    }
    floor = [model["floor_tokens_per_s"]["bf16"][batch] for batch in batches]
    # The floor may lie far above all engines at large batches; it may leave the panel there.
    top = 1.08 * max(speed for speeds in series.values() for speed in speeds if speed is not None)
    parts = [_axes(f"{name}: decode, tokens/s by batch size", batches, top)]
    parts.append(_line([min(speed, top) for speed in floor], top, "black", "5 4"))
    parts.append(_key(0, "floor bf16", "black"))
    colours = {True: iter(_OURS * 4), False: iter(_PEERS * 4)}
    for index, (engine, speeds) in enumerate(series.items(), start=1):
        colour = next(colours[engine.startswith("mixfleet")])
        parts += [_line(speeds, top, colour), _key(index, engine, colour)]
    return "".join(parts)


def _x(index: int, count: int) -> float:
    return MARGIN + (WIDTH - 2 * MARGIN) * (index + 0.5) / count


def _y(value: float, top: float) -> float:
    return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * value / top


def _axes(title: str, batches: Sequence[str], top: float) -> str:
    parts = [f'<text x="{MARGIN}" y="{MARGIN / 2}" font-size="15">{escape(title)}</text>']
    for tick in range(_TICKS + 1):
        value = top * tick / _TICKS
        y = _y(value, top)
        parts.append(
            f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{WIDTH - MARGIN}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.0f}</text>'
        )
    for index, batch in enumerate(batches):
        x, y = _x(index, len(batches)), HEIGHT - MARGIN + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(batch)}</text>')
    return "".join(parts)


def _line(speeds: Sequence[float | None], top: float, colour: str, dashes: str = "") -> str:
    points = " ".join(
        f"{_x(index, len(speeds)):.1f},{_y(speed, top):.1f}"
        for index, speed in enumerate(speeds)
        if speed is not None
    )
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{style}/>'


def _key(index: int, name: str, colour: str) -> str:
    x, y = WIDTH - MARGIN / 2, MARGIN + 20 * index
    return (
        f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" stroke="{colour}" stroke-width="3"/>'
        f'<text x="{x + 30}" y="{y + 4}">{escape(name)}</text>'
    )
