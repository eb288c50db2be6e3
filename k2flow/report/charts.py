"""Charts as inline SVG; pure functions of their data. The page's style sheet colours them by class.

`name` is the id of a chart, unique on the page. Each chart has a title and a description for screen readers, and marks
with tooltips. Text is escaped, and cleaned of characters that no document may contain.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from xml.etree import ElementTree

from markupsafe import Markup

from k2flow.report import formats
from k2flow.report.axes import SECOND_US, Axis, time_ticks, value_ticks
from k2flow.report.figures import Candle

WIDTH, HALF = 1080, 520  # width of a chart across the page, and of one of two side by side
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 30
SIZE_LABELS, TIME_LABEL = 6, 110  # size labels that fit below a chart of half the width, and the width of a time label
BAR = 23
COLOURS = 8  # series have the classes s0 to s7, repeated


@dataclass(frozen=True)
class Line:
    """A line of a chart: a value for each step that has one; `dashed` marks the second line of a colour."""

    name: str
    colour: int
    values: Mapping[int, float]
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar: its name, and its parts by colour number."""

    name: str
    parts: Mapping[int, int]


def colour(number: int) -> str:
    """Return the class of a series."""
    return f"s{number % COLOURS}"


class _Drawing:
    def __init__(
        self, name: str, title: str, description: str, height: int, bottom: int = BOTTOM, width: int = WIDTH
    ) -> None:
        self.height = height
        self.low, self.high = height - bottom, TOP
        self.left, self.right = LEFT, width - RIGHT
        self.svg = ElementTree.Element("svg", viewBox=f"0 0 {width} {height}", role="img", id=name)
        self.svg.set("class", "chart" if width == WIDTH else "chart half")
        self.svg.set("aria-labelledby", f"{name}-title {name}-description")
        ElementTree.SubElement(self.svg, "title", id=f"{name}-title").text = formats.clean(title)
        ElementTree.SubElement(self.svg, "desc", id=f"{name}-description").text = formats.clean(description)

    def add(self, tag: str, classes: str, tip: str = "", **attributes: float | str) -> ElementTree.Element:
        texts = {name: _text(value) for name, value in attributes.items()}
        mark = ElementTree.SubElement(self.svg, tag, {"class": classes, **texts})
        if tip:
            ElementTree.SubElement(mark, "title").text = formats.clean(tip)
        return mark

    def text(self, text: str, x: float, y: float, classes: str) -> None:
        self.add("text", classes, x=x, y=y).text = formats.clean(text)

    def y(self, value: float, low: float, high: float) -> float:
        return self.low - (value - low) / (high - low) * (self.low - self.high)

    def grid(self, ticks: Sequence[float], labels: Iterable[str]) -> None:
        """Draw a line for each tick; the first and the last are the ends of the plot."""
        for value, label in zip(ticks, labels, strict=True):
            y = self.y(value, ticks[0], ticks[-1])
            self.add("line", "grid", x1=self.left, x2=self.right, y1=y, y2=y)
            self.text(label, self.left - 8, y + 4, "end")

    def times(self, axis: Axis) -> None:
        for us, label in time_ticks(axis.begin_us, axis.end_us, int(self.right) // TIME_LABEL):
            x = self.x(axis, (us - axis.begin_us) / axis.step_us)
            self.add("line", "tick", x1=x, x2=x, y1=self.low, y2=self.low + 5)
            fits = x + TIME_LABEL / 3 < self.right + RIGHT
            self.text(label, x if fits else self.right + RIGHT, self.low + 20, "middle" if fits else "end")

    def x(self, axis: Axis, step: float) -> float:
        return self.left + step / axis.steps * (self.right - self.left)

    def markup(self) -> Markup:
        return Markup(ElementTree.tostring(self.svg, encoding="unicode"))  # ElementTree escapes text


def columns(name: str, title: str, axis: Axis, series: Mapping[str, Sequence[int]]) -> Markup:
    """Draw counts in steps of time as stacked columns; the i-th series has the i-th colour."""
    totals = [sum(counts) for counts in zip(*series.values(), strict=True)]
    description = (
        f"Counts for each {formats.step(axis.step_us)} {_period(axis)}: "
        f"{', '.join(f'{each} {sum(counts):,}' for each, counts in series.items())}; maximum {max(totals):,}."
    )
    drawing = _Drawing(name, title, description, 220, width=HALF)
    ticks = value_ticks(0, max(totals), 1)
    drawing.grid(ticks, map(formats.compact, ticks))
    drawing.times(axis)
    gap = 0.15 if axis.steps <= 40 else 0.0
    for step in range(axis.steps):
        x, end = drawing.x(axis, step + gap / 2), drawing.x(axis, step + 1 - gap / 2)
        at, below = _begin(axis, step), 0
        for number, (each, counts) in enumerate(series.items()):
            if not counts[step]:
                continue
            low, high = (drawing.y(value, 0, ticks[-1]) for value in (below, below + counts[step]))
            tip = f"{at}: {each} {counts[step]:,}"
            drawing.add("rect", f"fill {colour(number)}", tip, x=x, y=high, width=end - x, height=low - high)
            below += counts[step]
    return drawing.markup()


def lines(name: str, title: str, axis: Axis, series: Sequence[Line]) -> Markup:
    """Draw seconds over time. Steps without a value leave a gap; a value between two gaps is a point."""
    values = [value for line in series for value in line.values.values()]
    listed = (f"{line.name} at most {formats.duration(max(line.values.values()))}" for line in series if line.values)
    drawing = _Drawing(name, title, f"Durations {_period(axis)}: {'; '.join(listed)}.", 250)
    ticks = value_ticks(0, max(values, default=0.0))
    drawing.grid(ticks, (formats.duration(tick) if tick else "0" for tick in ticks))
    drawing.times(axis)
    for line in series:
        classes = f"stroke {colour(line.colour)}" + (" dashed" if line.dashed else "")
        for run in _runs(line.values):
            points = [(drawing.x(axis, step + 0.5), drawing.y(line.values[step], 0, ticks[-1])) for step in run]
            if len(run) > 1:
                drawing.add("polyline", classes, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))
            for step, (x, y) in zip(run, points, strict=True):
                tip = f"{_begin(axis, step)}: {line.name} {formats.duration(line.values[step])}"
                drawing.add("circle", f"point {classes}", tip, cx=x, cy=y, r=3)
    return drawing.markup()


def _runs(values: Mapping[int, float]) -> list[list[int]]:
    runs: list[list[int]] = []
    for step in sorted(values):
        if runs and runs[-1][-1] == step - 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs


def bars(name: str, title: str, rows: Sequence[Bar], names: Sequence[str]) -> Markup:
    """Draw a horizontal bar for each row, stacked from series of these names."""
    most = max((sum(row.parts.values()) for row in rows), default=0)
    listed = ", ".join(f"{row.name} {sum(row.parts.values()):,}" for row in rows)
    drawing = _Drawing(name, title, f"{listed}.", BAR * len(rows) + 12)
    begin, end = 210, WIDTH - 60
    for i, row in enumerate(rows):
        y, x = 6 + BAR * i, float(begin)
        drawing.text(_shorten(row.name, 32), begin - 10, y + 16, "end label")
        for number, count in row.parts.items():
            width, tip = (end - begin) * count / most if most else 0.0, f"{row.name}: {names[number]} {count:,}"
            drawing.add("rect", f"fill {colour(number)}", tip, x=x, y=y + 3, width=width, height=BAR - 6)
            x += width
        drawing.text(f"{sum(row.parts.values()):,}", x + 8, y + 16, "start value")
    return drawing.markup()


def histogram(name: str, title: str, counts: Mapping[int, int], target_bytes: int) -> Markup:
    """Draw files by size: column n has the files of 2^n up to 2^(n+1) bytes; a line marks the target size."""
    goal = target_bytes.bit_length() - 1
    first, last = min([goal, *counts]), max([goal, *counts])
    listed = ", ".join(f"{count:,} from {formats.size(2**power)}" for power, count in sorted(counts.items()))
    description = f"Files by size: {listed or 'none'}; the target is {formats.size(target_bytes)}."
    drawing = _Drawing(name, title, description, 180, width=HALF)
    ticks = value_ticks(0, max(counts.values(), default=0), 1, 3)
    drawing.grid(ticks, map(formats.compact, ticks))
    axis = Axis(0, 1, last - first + 1)
    labelled = -(-axis.steps // SIZE_LABELS)
    for power in range(first, last + 1):
        x, end = drawing.x(axis, power - first + 0.08), drawing.x(axis, power - first + 0.92)
        if count := counts.get(power, 0):
            y = drawing.y(count, 0, ticks[-1])
            tip = f"{formats.size(2**power)} to {formats.size(2 ** (power + 1))}: {count:,} files"
            size = "small" if 2**power < target_bytes // 2 else "well"
            drawing.add("rect", f"fill {size}", tip, x=x, y=y, width=end - x, height=drawing.low - y)
        if (power - first) % labelled == 0:
            drawing.text(formats.size(2**power), drawing.x(axis, power - first), drawing.low + 20, "middle")
    x = drawing.x(axis, goal - first + target_bytes / 2**goal - 1)
    drawing.add("line", "goal", f"target size: {formats.size(target_bytes)}", x1=x, x2=x, y1=TOP, y2=drawing.low)
    return drawing.markup()


def candles(name: str, title: str, axis: Axis, found: Mapping[int, Candle]) -> Markup:
    """Draw candles of open, high, low, close (hollow if the close is not below the open), and the volume."""
    low, high = min(each.low for each in found.values()), max(each.high for each in found.values())
    first, last = found[min(found)], found[max(found)]
    description = (
        f"{len(found)} candles of {formats.step(axis.step_us)} {_period(axis)}: opens at {formats.amount(first.open)}, "
        f"highest {formats.amount(high)}, lowest {formats.amount(low)}, closes at {formats.amount(last.close)}."
    )
    drawing = _Drawing(name, title, description, 360, bottom=110)
    ticks = value_ticks(float(low), float(high))
    drawing.grid(ticks, (f"{tick:,.10g}" for tick in ticks))
    base, room = drawing.height - BOTTOM, 60
    most = max(each.volume for each in found.values()) or Decimal(1)
    drawing.add("line", "grid", x1=drawing.left, x2=drawing.right, y1=base, y2=base)
    drawing.text(formats.compact(float(f"{most:.3g}")), drawing.left - 8, base - room + 4, "end")
    drawing.text("volume", drawing.left - 8, base, "end")
    for step, each in sorted(found.items()):
        left, right = drawing.x(axis, step + 0.15), drawing.x(axis, step + 0.85)
        opens, highest, lowest, closes = (
            drawing.y(float(price), ticks[0], ticks[-1]) for price in (each.open, each.high, each.low, each.close)
        )
        upper, lower, centre = min(opens, closes), max(opens, closes), f"{(left + right) / 2:.1f}"
        way = "up" if each.close >= each.open else "down"
        amounts = (
            f"{name} {formats.amount(getattr(each, name))}" for name in ("open", "high", "low", "close", "volume")
        )
        tip = f"{_begin(axis, step)}: {', '.join(amounts)}, {each.trades:,} trades"
        drawing.add("path", f"wick {way}", d=f"M{centre} {highest:.1f}V{upper:.1f}M{centre} {lower:.1f}V{lowest:.1f}")
        tall = max(lower - upper, 1.0)
        drawing.add("rect", f"body {way}", tip, x=left, y=upper, width=right - left, height=tall)
        tall = room * float(each.volume / most)
        drawing.add("rect", f"volume {way}", tip, x=left, y=base - tall, width=right - left, height=tall)
    drawing.low = base
    drawing.times(axis)
    return drawing.markup()


def _period(axis: Axis) -> str:
    return f"from {formats.moment(axis.begin_us)} to {formats.moment(axis.end_us)} UTC"


def _begin(axis: Axis, step: int) -> str:
    """Return the moment when a step begins, with fractions of seconds if steps have them."""
    return formats.moment(axis.begin_us + step * axis.step_us, axis.step_us % SECOND_US > 0)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
