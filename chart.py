"""
Curves as SVG, written by hand: no library is needed to look at them, and they are as sharp on a phone.
"""
import html
import math

LEFT, RIGHT, TOP, BOTTOM, WIDE, HIGH = 38, 290, 10, 178, 370, 200  # of a chart; names stand right of it
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2")  # by which curves are told apart, beside colour and name
POINTS = 300  # of a curve, at most
APART = 11    # between two names
# Once in a page: what curves are cut at.
FRAME = (f'<svg class="nothing"><clipPath id="frame"><rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" '
         f'height="{BOTTOM - TOP}"/></clipPath></svg>')


def ticks(low, high):
    """Round numbers from low to high, two to six of them."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= max(k for k in (1, 2, 5) if (high - low) / (k * step) >= 2)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title, curves, limits=None, marks=()):
    """A figure, HTML. curves: {name: (colour, dash, [(x, y)])}. limits: of y; a curve may leave through the
    top, marked ▲. marks: [(name, x, sign)], signs on curves."""
    ys = [y for *_, points in curves.values() for _, y in points]
    low, high = limits or (min(ys), max(ys))
    low, high = (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)
    last = max(1, *(points[-1][0] for *_, points in curves.values()))
    across = lambda x: f"{LEFT + (RIGHT - LEFT) * x / last:.1f}"
    up = lambda y: BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low)
    parts, names = axes(low, high, last, across, up), []
    for name, (colour, dash, points) in curves.items():
        thin = points[::math.ceil(len(points) / POINTS)] + points[-1:]
        line = " ".join(f"{across(x)},{up(y):.1f}" for x, y in thin)
        parts.append(f'<polyline class="curve" clip-path="url(#frame)" stroke="{colour}" '
                     f'stroke-dasharray="{dash}" points="{line}"/>')
        value, fill = dict(points), f'style="fill: {colour}"'
        middle = f'text-anchor="middle" {fill}'
        signs = [(x, sign) for n, x, sign in marks if n == name and value.get(x, high + 1) <= high]
        parts += [text("mark", across(x), up(value[x]) + 4, sign, middle) for x, sign in signs]
        out = [x + (a - x) * (high - y) / (b - y)  # where the curve crosses the top
               for (x, y), (a, b) in zip(points, points[1:]) if y <= high < b]
        parts += [text("mark", across(x), TOP + 4, "▲", middle) for x in out[:1]]
        names.append((up(min(max(points[-1][1], low), high)), name + " ▲" * (points[-1][1] > high), fill))
    names.sort()
    at = TOP - APART
    for left, (y, name, fill) in zip(range(len(names), 0, -1), names):
        at = max(min(y, BOTTOM - APART * (left - 1)), at + APART)  # so that those below have room
        parts.append(text("name", RIGHT + 4, at + 3, name, fill))
    title = html.escape(title)
    return (f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDE} {HIGH}" role="img" '
            f'aria-label="{title}">{"".join(parts)}</svg></figure>')


def axes(low, high, last, across, up):
    """Lines and numbers, of y from low to high and of x from 0 to last; across, up: where these stand."""
    parts = []
    for y in ticks(low, high):
        parts += [f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>',
                  text("tick", LEFT - 4, up(y) + 3, f"{y:.4g}", 'text-anchor="end"')]
    return parts + [text("tick", across(x), BOTTOM + 14, f"{x:g}", 'text-anchor="middle"')
                    for x in ticks(0, last)]


def text(kind, x, y, what, more):
    return f'<text class="{kind}" x="{x}" y="{y:.1f}" {more}>{html.escape(what)}</text>'
