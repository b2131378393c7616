"""Draw docs/idea.svg, the schematic at the top of the README.

    python docs/draw_idea.py

Every small square is a patch. Colours follow the input frames along time, light and dark in turn, so that a merged
frame shows which of its patches came from which parent.
"""

import random
from colorsys import hsv_to_rgb
from pathlib import Path


FRAME, PATCHES, WIDTH, LEFT = 30, 3, 720, 150  # a frame's side in pixels, its patches in a row, the drawing, its margin
STAGES = [(8, 16, "blocks 1 to 5"), (103, 8, "blocks 6 and 7"), (198, 4, "blocks 8 to 12, mean")]  # y, frames, text
# GitHub shows the drawing on white and on black pages.
STYLE = """
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.small { font-size: 11px; fill: #59636e }
path { stroke: #8c959f; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .small { fill: #9198a1 } path { stroke: #656c76 } }
"""


def merge_pairs(frames: list, rng: random.Random) -> list:
    """Frames, lists of colours, -> half as many: each patch alpha times its first parent plus beta times its second."""
    merged = []
    for pair in zip(frames[0::2], frames[1::2], strict=True):
        patches = []
        for first, second in zip(*pair, strict=True):
            alpha = rng.choice((0.05, 0.25, 0.75, 0.95))
            patches.append([alpha * p + (1 - alpha) * q for p, q in zip(first, second, strict=True)])
        merged.append(patches)
    return merged


def centres(count: int) -> list[float]:
    return [LEFT + (WIDTH - LEFT) / count * (i + 0.5) for i in range(count)]


def draw_frame(x: float, y: float, colours: list) -> list[str]:
    side, parts = FRAME / PATCHES, []
    for k, colour in enumerate(colours):
        place = f'x="{x - FRAME / 2 + side * (k % PATCHES):.1f}" y="{y + side * (k // PATCHES):.1f}"'
        fill = ",".join(f"{255 * c:.0f}" for c in colour)
        parts.append(f'<rect {place} width="{side - 1}" height="{side - 1}" rx="1.5" fill="rgb({fill})"/>')
    return parts


def draw_merge(y: float, count: int) -> list[str]:
    """Lines from pairs of frames to the `count` frames at y, and their caption."""
    parts, above = [], centres(2 * count)
    for i, x in enumerate(above):
        end = centres(count)[i // 2]
        parts.append(f'<path d="M{x:.1f} {y - 62} C{x:.1f} {y - 25} {end:.1f} {y - 40} {end:.1f} {y - 5}"/>')
    caption = f'<text x="38" y="{y - 32}" class="small">α, β for each patch</text>'
    return [*parts, f'<text x="8" y="{y - 32}">InTI</text>', caption]


def draw() -> str:
    rng = random.Random(2)
    frames = [[hsv_to_rgb(0.5 + 0.6 * t / 15, (0.45, 0.85)[t % 2], (0.95, 0.8)[t % 2])] * PATCHES**2 for t in range(16)]
    parts = []
    for y, count, blocks in STAGES:
        if count < len(frames):
            frames = merge_pairs(frames, rng)
            parts += draw_merge(y, count)
        for x, colours in zip(centres(count), frames, strict=True):
            parts += draw_frame(x, y, colours)
        parts.append(f'<text x="8" y="{y + 13}">{count} frames</text>')
        parts.append(f'<text x="8" y="{y + 28}" class="small">CLIP {blocks}</text>')
    height = STAGES[-1][0] + FRAME + 8
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", *parts, "</svg>\n"]
    )


if __name__ == "__main__":
    (Path(__file__).parent / "idea.svg").write_text(draw())
