"""One SVG in the making, which escapes every text put into it and has a title and a description."""

from __future__ import annotations

from html import escape


class Drawing:
    """One SVG in the making: elements are added in order, :meth:`render` gives the markup.

    Args:
        width: Width of the coordinate system in CSS pixels at natural size.
        height: Height of it.
        key: Unique in the page; ids inside the picture derive from it.
        title: What the picture is, for screen readers.
        description: What it shows, in a sentence.
    """

    def __init__(self, width: float, height: float, *, key: str, title: str, description: str) -> None:
        self.width, self.height, self.key = width, height, key
        self._head = f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>'
        self._parts: list[str] = []

    def add(self, tag: str, text: str | None = None, *, tip: str | None = None, **attributes: str | float) -> None:
        """Append an element; ``text`` is its content, ``tip`` a tooltip, underscores in names become hyphens."""
        pairs = "".join(
            f' {name.rstrip("_").replace("_", "-")}="{escape(attribute(value))}"' for name, value in attributes.items()
        )
        content = (f"<title>{escape(tip)}</title>" if tip else "") + escape(text or "")
        self._parts.append(f"<{tag}{pairs}>{content}</{tag}>" if content else f"<{tag}{pairs}/>")

    def text(self, x: float, y: float, text: str, kind: str = "label", anchor: str = "start") -> None:
        """Append a line of text with its base line at ``y``."""
        self.add("text", text, x=x, y=y, class_=kind, text_anchor=anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Append a straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)

    @property
    def hatch(self) -> str:
        """The ``fill`` of something removed: stripes, so that it is told apart without colour."""
        return f"url(#{self.key}-h)"

    def render(self) -> str:
        """The SVG element."""
        hatch = (
            f'<defs><pattern id="{self.key}-h" width="5" height="5" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="5" height="5" class="hatch-ground"/>'
            '<rect width="2.2" height="5" class="hatch-stripe"/></pattern></defs>'
        )
        body = "".join(self._parts)
        return (
            f'<svg viewBox="0 0 {attribute(self.width)} {attribute(self.height)}" role="img" '
            f'aria-labelledby="{self.key}-t {self.key}-d" style="max-width:{attribute(self.width * 1.25)}px">'
            f"{self._head}{hatch if self.hatch in body else ''}{body}</svg>"
        )


def attribute(value: str | float) -> str:
    """``value`` as an attribute holds it: a number with at most two decimals."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
