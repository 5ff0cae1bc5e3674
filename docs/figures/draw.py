"""python docs/figures/draw.py: the drawings of the kernels, as SVG for light and dark pages."""

from __future__ import annotations

from pathlib import Path

WIDTH = 440  # a phone shows it nearly at this size
GREY, COLOURS = "#767c84", ("#3b82c4", "#d9822b", "#3a9d5d", "#8e6bbf")


class Drawing:
    """Shapes in the order in which they were added."""

    def __init__(self, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{title}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>',
            f'<g font-family="sans-serif" font-size="13" fill="{GREY}">',
        ]

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", size: int = 13) -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{words}</text>')

    def box(self, x: float, y: float, width: float, height: float, colour: str = "none", opacity: float = 1) -> None:
        """A rectangle with a grey edge."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect {place} rx="2" fill="{colour}" fill-opacity="{opacity:g}" stroke="{GREY}"/>')

    def named(self, x: float, y: float, width: float, words: str, colour: str = "none", opacity: float = 1) -> None:
        """A box of one line, with its words in the middle."""
        self.box(x, y, width, 26, colour, opacity)
        self.text(x + width / 2, y + 18, words, anchor="middle", size=12)

    def cells(self, x: float, y: float, width: float, count: int, colour: str, opacity: float = 0.8) -> None:
        """A row of equal boxes."""
        for index in range(count):
            self.box(x + index * width / count, y, width / count, 14, colour, opacity)

    def dot(self, x: float, y: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{colour}" stroke="{GREY}"/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, colour: str = GREY) -> None:
        line = f'x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}"'
        self.parts.append(f'<line {line} stroke="{colour}" stroke-width="1.3" marker-end="url(#head)"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</g>", "</svg>", ""])


def query_tile() -> Drawing:
    """The forward: a warp prepares the samples of four queries and then gathers their value vectors."""
    drawing = Drawing(470, "A warp works on a tile of four queries")
    drawing.text(8, 18, "global memory: locations and weights, 4 queries, K samples each")
    for query, colour in enumerate(COLOURS):
        drawing.cells(90, 28 + 18 * query, 340, 16, colour, 0.45)
        drawing.text(8, 40 + 18 * query, f"query {query}", size=12)
    drawing.arrow(260, 104, 260, 134)
    drawing.text(8, 124, "one sample per lane: pixel, neighbour mask,", size=12)
    drawing.text(270, 124, "fractions, weight", size=12)
    drawing.text(8, 152, "shared memory: prepared samples, 16 bytes each")
    for query, colour in enumerate(COLOURS):
        drawing.cells(90, 162 + 18 * query, 340, 16, colour, 0.9)
    drawing.arrow(260, 238, 260, 262)
    drawing.text(8, 258, "every lane reads the samples of its query", size=12)
    drawing.text(8, 284, "a warp of 32 lanes: 8 per query, each holds 4 of D = 32 channels")
    for query, colour in enumerate(COLOURS):
        x = 8 + 108 * query
        drawing.cells(x, 294, 100, 8, colour)
        _neighbours(drawing, x + 18, 320, colour, (0.62 - 0.12 * query, 0.35 + 0.1 * query))
        drawing.arrow(x + 50, 318, x + 50, 310)
    drawing.text(8, 404, "for each sample: four value vectors, 16 bytes per lane and neighbour", size=12)
    drawing.arrow(220, 410, 220, 426)
    for query, colour in enumerate(COLOURS):
        drawing.cells(8 + 108 * query, 430, 100, 8, colour)
    drawing.text(8, 462, "output: one store per lane")
    return drawing


def _neighbours(drawing: Drawing, x: float, y: float, colour: str, at: tuple[float, float]) -> None:
    """Pixels of a level, a sample between four of them, and these four filled."""
    side = 16
    for row in range(4):
        for column in range(4):
            inside = row in (1, 2) and column in (1, 2)
            drawing.box(x + side * column, y + side * row, side, side, colour if inside else "none", 0.6)
    drawing.dot(x + side * (1.5 + at[0]), y + side * (1.5 + at[1]), "#ffffff")


def bucket_reduction() -> Drawing:
    """The sorted backward: blocks write sorted runs, warps reduce buckets."""
    drawing = Drawing(400, "Sorted backward: sort by bucket, then reduce each bucket")
    drawing.text(8, 18, "contributions of consecutive samples, in the order of the samples")
    order = (0, 2, 1, 3, 0, 1, 3, 2, 2, 0, 3, 1, 1, 3, 0, 2, 3, 0, 2, 1, 0, 2, 1, 3)
    for index, bucket in enumerate(order):
        drawing.box(8 + 17.6 * index, 28, 17.6, 14, COLOURS[bucket], 0.7)
    for run in range(3):
        drawing.arrow(78 + 141 * run, 46, 78 + 141 * run, 74)
    drawing.text(8, 92, "bucket_sort: a block sorts its samples, and writes one run")
    spans = ((40, 12, 30, 8, 24, 10, 10), (24, 8, 30, 10, 34, 12, 16), (30, 10, 22, 12, 28, 8, 24))
    ends: dict[int, list[float]] = {bucket: [] for bucket in range(4)}
    for run, widths in enumerate(spans):
        x = 8.0 + 144 * run
        for index, width in enumerate(widths):
            bucket, across = index // 2, index % 2 == 1
            drawing.box(x, 102, width, 22, COLOURS[bucket], 0.35 if across else 0.9)
            ends[bucket].append(x + width / 2)
            if across:
                ends[bucket + 1].append(x + width / 2)
            x += width
        drawing.text(8 + 144 * run, 140, f"run {run}", size=12)
    drawing.text(8, 166, "pale: two pixels of which the second is in the next bucket,", size=12)
    drawing.text(8, 182, "so that both buckets read the segment", size=12)
    for bucket, colour in enumerate(COLOURS):
        for x in ends[bucket]:
            drawing.arrow(x, 190, 58 + 108 * bucket, 262, colour)
    drawing.text(8, 280, "reduce_buckets: a warp per bucket sums in the order of the runs")
    for bucket, colour in enumerate(COLOURS):
        drawing.named(8 + 108 * bucket, 288, 100, f"bucket {bucket}", colour, 0.2)
        drawing.arrow(58 + 108 * bucket, 316, 58 + 108 * bucket, 342)
    drawing.text(8, 394, "gradient of value: each vector is written once, without atomics")
    for bucket, colour in enumerate(COLOURS):
        drawing.cells(8 + 108 * bucket, 348, 100, 8, colour, 0.9)
        drawing.text(58 + 108 * bucket, 376, "8 pixels", anchor="middle", size=11)
    return drawing


def fused_front_end() -> Drawing:
    """What a model's projections go through, unfused and fused."""
    drawing = Drawing(420, "The fused front end keeps locations and weights out of memory")
    blue, orange, green, _ = COLOURS
    drawing.text(8, 18, "unfused")
    drawing.text(248, 18, "fused")
    for x, fused in ((8, False), (248, True)):
        for row, words in enumerate(("references", "offsets", "logits")):
            drawing.named(x, 28 + 32 * row, 84, words, blue, 0.18)
        if fused:
            drawing.box(x, 150, 184, 130, orange, 0.12)
            drawing.text(x + 92, 170, "one kernel", anchor="middle")
            drawing.text(x + 92, 192, "locations and softmax,", anchor="middle", size=12)
            drawing.text(x + 92, 208, "float32, per query,", anchor="middle", size=12)
            drawing.text(x + 92, 224, "in shared memory", anchor="middle", size=12)
            drawing.arrow(x + 92, 232, x + 92, 250)
            drawing.text(x + 92, 268, "gather and sum", anchor="middle", size=12)
            drawing.arrow(x + 42, 122, x + 42, 148)
            drawing.named(x + 100, 92, 84, "value", blue, 0.18)
            drawing.arrow(x + 142, 122, x + 142, 148)
        else:
            drawing.arrow(x + 88, 57, x + 116, 57)
            drawing.arrow(x + 88, 105, x + 116, 105)
            drawing.named(x + 120, 44, 82, "locations", orange, 0.18)
            drawing.named(x + 120, 92, 82, "weights", orange, 0.18)
            drawing.text(x + 161, 138, "written, and read", anchor="middle", size=12)
            drawing.arrow(x + 161, 144, x + 161, 224)
            drawing.named(x, 160, 84, "value", blue, 0.18)
            drawing.arrow(x + 42, 190, x + 42, 224)
            drawing.box(x, 228, 202, 52, orange, 0.12)
            drawing.text(x + 101, 259, "kernel: gather and sum", anchor="middle", size=12)
    for x, width in ((8, 202), (248, 184)):
        drawing.arrow(x + width / 2, 282, x + width / 2, 304)
        drawing.named(x + width / 2 - 45, 308, 90, "output", green, 0.18)
    drawing.text(8, 364, "The backward makes locations and weights again from the same", size=12)
    drawing.text(8, 382, "inputs, and gives the gradients of offsets, logits and references.", size=12)
    drawing.text(8, 400, "Those of references are summed over heads by a last kernel.", size=12)
    return drawing


def cross_level_tiles() -> Drawing:
    """The backward with aggregation: which pixels of three levels each of six blocks takes."""
    drawing = Drawing(356, "A block takes the pixels of all levels that lie in the same part of the image")
    drawing.text(8, 18, "queries are the pixels of three levels; a colour is a block")
    levels, bands, side = ((12, 16), (6, 8), (3, 4)), 3, 128
    for number, (h, w) in enumerate(levels):
        x = 24 + 142 * number
        drawing.text(x, 42, f"level {number}: {h} x {w} pixels", size=12)
        _tiles_of_level(drawing, x, 50, (h, w), (bands, side))
    for band in range(bands):
        drawing.text(19, 76 + 32 * band, f"{band}", anchor="end", size=12)
    drawing.text(8, 164, "bands 0 to 2: 4 rows of level 0, 2 of level 1, 1 of level 2;", size=12)
    drawing.text(8, 180, "in a band, a block takes the same part of each level, column by column", size=12)
    drawing.arrow(220, 188, 220, 206)
    drawing.text(8, 224, "the 42 queries of the first block")
    x = 8.0
    for number, (h, w) in enumerate(levels):
        count = h // bands * w // 2
        drawing.named(
            x, 232, 10 * count, f"{count} of level {number}" if count > 2 else "2", COLOURS[0], 0.45 - 0.15 * number
        )
        x += 10 * count
    drawing.arrow(220, 262, 220, 280)
    drawing.text(8, 298, "their samples are near each other in every level: the block adds up", size=12)
    drawing.text(8, 314, "those of a cell in registers, and adds the sums to grad_value", size=12)
    drawing.text(8, 342, "gradient of value: few additions per value vector of the part")
    return drawing


def _tiles_of_level(drawing: Drawing, x: float, y: float, size: tuple[int, int], of_all: tuple[int, int]) -> None:
    """The pixels of a level in the colours of their blocks: two per band. `of_all` are bands and the width here."""
    (h, w), (bands, side) = size, of_all
    width, height = side / w, 0.75 * side / h
    for row in range(h):
        for column in range(w):
            tile = 2 * (row * bands // h) + 2 * column // w
            colour, opacity = COLOURS[tile % len(COLOURS)], 0.8 if tile < len(COLOURS) else 0.3
            drawing.box(x + width * column, y + height * row, width, height, colour, opacity)


DRAWINGS = (query_tile, bucket_reduction, fused_front_end, cross_level_tiles)


def main() -> None:
    for draw in DRAWINGS:
        Path(__file__).with_name(f"{draw.__name__}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
