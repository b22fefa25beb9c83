"""Tables for a README, put between marks there, so that no number in it is typed.

>>> text = "# Title\\n<!-- answer -->\\nold\\n<!-- /answer -->\\nrest\\n"
>>> print(fill(text, {"answer": table(["metric", "ours"], [["power", "5"]])}), end="")
# Title
<!-- answer -->
| metric | ours |
|---|---|
| power | 5 |
<!-- /answer -->
rest
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from testbed.core.errors import SpecError


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = "|" + "---|" * len(head)
    written = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([written[0], rule, *written[1:]])


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Put each part between the marks of its name, in place of what stands there.

    Raises:
        SpecError: the text has no such marks, or more than one pair.
    """
    for name, part in parts.items():
        marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.S)
        found = list(marks.finditer(text))
        if len(found) != 1:
            raise SpecError(f"marks <!-- {name} --> ... <!-- /{name} -->: {len(found)}, not 1")
        text = f"{text[: found[0].end(1)]}{part}\n{text[found[0].start(2) :]}"
    return text
