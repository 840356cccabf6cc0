"""A drawing as SVG: lines, bars, dots and text on a canvas, and ticks of axes.

Written here because a drawing is a few kinds of elements, and the daemon, which draws while a search runs, needs no
plotting library for them. Colours are those of Okabe and Ito, which colour-blind people can tell apart.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path

from protocol.errors import UsageError
from protocol.runtime.files import write_atomically

BLUE, RED, GREEN, PURPLE, ORANGE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8a8a8a"
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, "#56b4e9")
INK, PALE = "#222222", "#dddddd"
"""Text and axes; the lines of a grid. Their classes are `ink` and `pale`, so that a page can recolour them."""
SHADES = 41
_SCALE = ((0, 32, 77), (49, 68, 107), (102, 105, 112), (149, 143, 120), (203, 186, 105), (255, 233, 69))
"""The colours of `shade` as red, green and blue: points on the scale Cividis, whose lightness rises evenly."""


class Drawing:
    """An SVG drawing, which notebooks show by themselves."""

    def __init__(self, svg: str) -> None:
        self.svg = svg

    @property
    def on_white(self) -> str:
        """The SVG with a white background, for places that may be dark."""
        return self.svg.replace("</desc>", '</desc><rect width="100%" height="100%" fill="#ffffff"/>', 1)

    def _repr_svg_(self) -> str:
        return self.on_white

    def save(self, path: str | Path) -> Path:
        """Write the drawing as an SVG file, or as a PNG file if the name ends in `.png`.

        PNG needs the extra `plots`. Raises UsageError without it, and for a file that cannot be written.
        """
        file = Path(path)
        content: str | bytes = self.on_white
        if file.suffix.lower() == ".png":
            content = self.png()
        try:
            if isinstance(content, str):
                write_atomically(file, content)
            else:
                file.write_bytes(content)
        except OSError as error:
            raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}") from error
        return file

    def png(self) -> bytes:
        """Return the drawing as a PNG file with twice as many pixels. Raises UsageError without the extra `plots`."""
        if find_spec("resvg_py") is None or find_spec("matplotlib") is None:
            raise UsageError("PNG files need packages that are not installed: pip install 'self-pruner[plots]'")
        import matplotlib as mpl
        import resvg_py

        fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"  # a server often has no fonts
        rendered = resvg_py.svg_to_bytes(
            svg_string=self.svg,
            zoom=2,
            background="#ffffff",
            font_files=[str(fonts / "DejaVuSans.ttf"), str(fonts / "DejaVuSans-Bold.ttf")],
            sans_serif_family="DejaVu Sans",
        )
        return bytes(rendered)


class Canvas:
    """Collects the elements of a drawing of `width` × `height` units; (0, 0) is at the top left."""

    def __init__(self, width: float, height: float, title: str, summary: str) -> None:
        self.width, self.height = width, height
        self._parts = [f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>"]

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = INK, *, dashes: str = "") -> None:
        """Draw a thin line."""
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{_stroke(colour)} stroke-width="1"{dashed}/>'
        )

    def steps(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Draw a line that keeps the height of a point until the next point."""
        moves = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
        moves += [f"H{x:.1f}V{y:.1f}" for x, y in points[1:]]
        self._parts.append(f'<path d="{"".join(moves)}" fill="none"{_stroke(colour)} stroke-width="2"/>')

    def dots(self, points: Iterable[tuple[float, float]], colour: str) -> None:
        """Draw round dots, as one element for all, because a search may have thousands."""
        moves = "".join(f"M{x:.1f} {y:.1f}h.01" for x, y in points)
        if moves:
            self._parts.append(
                f'<path d="{moves}" fill="none"{_stroke(colour)} stroke-width="5" stroke-linecap="round" '
                'opacity="0.6" class="dots"/>'
            )

    def bar(self, x: float, y: float, width: float, height: float, colour: str, about: str = "") -> None:
        """Draw a filled rectangle; `about` is shown while the mouse is on it."""
        said = f"<title>{escape(about)}</title>" if about else ""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">{said}</rect>'
        )

    def cells(self, corners: Iterable[tuple[float, float]], width: float, height: float, colour: str) -> None:
        """Draw filled rectangles of one size at these upper left corners, as one element for all."""
        moves = "".join(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z" for x, y in corners)
        self._parts.append(f'<path d="{moves}" fill="{colour}"/>')

    def text(self, x: float, y: float, said: str, *, anchor: str = "start", colour: str = INK, size: int = 12) -> None:
        """Write one line of text; `anchor` is start, middle or end."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{_fill(colour)}>'
            f"{escape(said)}</text>"
        )

    def drawing(self) -> Drawing:
        """Return what was drawn."""
        return Drawing(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" role="img" font-family="DejaVu Sans, sans-serif">'
            + "".join(self._parts)
            + "</svg>"
        )


class Scale:
    """Maps values from `low` to `high` onto positions from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        """Return the position of `value`; a value outside the range is put at its border."""
        inside = min(max(value, self.low), self.high)
        return self._start + (inside - self.low) / (self.high - self.low) * self._length

    def ticks(self, about: int) -> list[float]:
        """Return round values within the range, about this many."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def shade(share: float) -> str:
    """Return the colour for a share from 0 (dark blue) to 1 (yellow), one of SHADES."""
    place = round(min(max(share, 0.0), 1.0) * (SHADES - 1)) / (SHADES - 1) * (len(_SCALE) - 1)
    below = min(int(place), len(_SCALE) - 2)
    darker, lighter = _SCALE[below], _SCALE[below + 1]
    mixed = (d + (b - d) * (place - below) for d, b in zip(darker, lighter, strict=True))
    return "#" + "".join(f"{round(each):02x}" for each in mixed)


def _stroke(colour: str) -> str:
    return f' stroke="{colour}"' + _class(colour, "stroke")


def _fill(colour: str) -> str:
    return f' fill="{colour}"' + _class(colour, "fill")


def _class(colour: str, use: str) -> str:
    name = {INK: "ink", PALE: "pale"}.get(colour)
    return f' class="{name}-{use}"' if name else ""
