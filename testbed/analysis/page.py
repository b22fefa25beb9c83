"""One self-contained HTML page: styles, script, Plotly and data inside, nothing is loaded.

>>> tag("td", "a < b", cls="n")
'<td class="n">a &lt; b</td>'
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from testbed.analysis.drawing import Figure


class Page:
    """A page being put together, section by section."""

    def __init__(self, title: str, made_by: str = "testbed report") -> None:
        self.title = title
        self._made_by = made_by
        self._head = ""
        self._sections: list[tuple[str, str, str]] = []
        self._figures: list[Figure] = []

    def head(self, html: str) -> None:
        """What stands above the navigation."""
        self._head += html

    def section(self, name: str, title: str, html: str) -> None:
        """A part with a place in the navigation; empty ones are left out."""
        if html:
            self._sections.append((name, title, html))

    def figures(self, figures: Sequence[Figure]) -> str:
        """HTML of a grid of figures."""
        return f'<div class="grid">{"".join(self._figure(f) for f in figures)}</div>' * bool(
            figures
        )

    def _figure(self, figure: Figure) -> str:
        place = len(self._figures)
        self._figures.append(figure)
        pressed = [str(trace.get("visible", False)).lower() for trace in figure.data]
        choices = "".join(
            f'<button aria-pressed="{state}">{escape(name)}</button>'
            for name, state in zip(figure.buttons, pressed, strict=False)
        )
        return (
            f'<section class="card{" wide" * figure.wide}"><header><h3>{escape(figure.title)}</h3>'
            f"<p>{escape(figure.note)}</p>"
            + f'<div class="choices" data-of="{figure.name}">{choices}</div>'
            * bool(choices)
            + f'</header><div id="figure-{figure.name}" data-figure="{place}" '
            f'style="height:{figure.height}px"></div></section>'
        )

    def html(self) -> str:
        """The whole page."""
        links = "".join(
            f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in self._sections
        )
        parts = "".join(
            f'<h2 id="{name}">{escape(title)}</h2>{html}' for name, title, html in self._sections
        )
        body = (
            f"<header><div>{self._head}</div></header>"
            f'<nav><div>{links}<button id="theme">Dark</button></div></nav><main>{parts}</main>'
            f"<footer>Drawn from recordings alone by <code>{escape(self._made_by)}</code>. "
            "Drag to zoom all time axes together, double-click to go back.</footer>"
        )
        figures = [
            {
                "data": figure.data,
                "layout": figure.layout,
                "height": figure.height,
                "over_time": figure.over_time,
            }
            for figure in self._figures
        ]
        values = {
            "title": escape(self.title),
            "css": _read("page.css"),
            "body": body,
            "plotly": get_plotlyjs(),
            # "</" would end the script element early
            "figures": json.dumps(figures, allow_nan=False, separators=(",", ":")).replace(
                "</", "<\\/"
            ),
            "js": _read("page.js"),
        }
        html = _read("page.html")
        head, *rest = html.split("@")
        return head + "".join(
            values[part] if place % 2 == 0 else part for place, part in enumerate(rest)
        )


def _read(name: str) -> str:
    return files("testbed.analysis").joinpath(name).read_text(encoding="utf-8")


def tag(name: str, text: str, cls: str = "") -> str:
    """An element around text."""
    attribute = f' class="{cls}"' if cls else ""
    return f"<{name}{attribute}>{escape(text)}</{name}>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), name: str = ""
) -> str:
    """A table of text; columns in ``right`` hold numbers."""

    def line(cells: Sequence[str], cell: str) -> str:
        marked = (tag(cell, text, "n" if i in right else "") for i, text in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line(cells, "td") for cells in rows)
    ident = f' id="{name}"' if name else ""
    return f"<table{ident}><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def card(html: str, wide: bool = True) -> str:
    """A box around something that is not a figure."""
    return f'<section class="card{" wide" * wide}">{html}</section>'
