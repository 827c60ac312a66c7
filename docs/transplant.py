"""Draws docs/transplant.svg: which layers a map of layers copies, as `transplant` itself matches them.

python docs/transplant.py
"""

from __future__ import annotations

from pathlib import Path

from interfuse.transfer.matching import match

SOURCE, TARGET = 6, 12
PANELS = (("no map: by number", None), ('depth="spread"', "spread"), ('depth="repeat"', "repeat"))
STYLE = """
    .text { fill: #24292f; } .small { fill: #57606a; font-size: 12px; }
    .on { fill: #0969da; } .inner { fill: #ffffff; font-size: 11px; }
    .off { fill: #f6f8fa; stroke: #57606a; stroke-dasharray: 3 3; } .line { stroke: #57606a; stroke-width: 1.2; }
    @media (prefers-color-scheme: dark) {
      .text { fill: #e6edf3; } .small { fill: #8b949e; } .on { fill: #4493f8; } .inner { fill: #0d1117; }
      .off { fill: #21262d; stroke: #8b949e; } .line { stroke: #8b949e; }
    }
"""
WIDE, HIGH, STEP, BOTTOM = 62, 17, 22, 318


def names(layers: int) -> list[str]:
    """One tensor a layer."""
    return [f"layers.{i}.weight" for i in range(layers)]


def layer(x: float, y: float, text: str) -> str:
    """A box: filled, with its number, or empty."""
    box = f'<rect class="{"on" if text else "off"}" x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="3"/>'
    return box + (f'<text class="inner" x="{x + WIDE / 2}" y="{y + 13}" text-anchor="middle">{text}</text>' if text else "")


def panel(left: float, title: str, depth: str | None) -> list[str]:
    """The source's layers, the target's, and a line for each that is copied."""
    given = match(names(SOURCE), names(TARGET), None, depth).given
    right, start = left + 140, BOTTOM - 3 * STEP
    parts = [f'<text class="text" x="{left + 101}" y="22" text-anchor="middle">{title}</text>']
    for x, side in ((left, "source"), (right, "target")):
        parts.append(f'<text class="small" x="{x + 31}" y="44" text-anchor="middle">{side}</text>')
    for j, name in enumerate(names(TARGET)):
        i = int(given[name].split(".")[1]) if name in given else None
        y = BOTTOM - j * STEP
        if i is not None:
            parts.append(f'<line class="line" x1="{left + WIDE}" y1="{start - i * STEP + 8.5}" x2="{right}" y2="{y + 8.5}"/>')
        parts.append(layer(right, y, "" if i is None else str(i)))
    return parts + [layer(left, start - i * STEP, str(i)) for i in range(SOURCE)]


def main() -> None:
    """Write the picture."""
    label = "Six layers copied into twelve: by number into the first six, spread into every second, repeated into two each"
    body = [part for n, (title, depth) in enumerate(PANELS) for part in panel(24 + n * 260, title, depth)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 350" role="img" aria-label="{label}" '
    head += 'font-family="system-ui, sans-serif" font-size="15">'
    text = "\n".join([head, f"<style>{STYLE}</style>", *body, "</svg>\n"])
    Path(__file__).with_suffix(".svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
