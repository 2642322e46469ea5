"""The table of families in ``docs/families.md``, made from what the tests check.

Run ``python tests/support/families_table.py`` to write it.  Each cell is one test of ``tests/models/test_families.py``
or ``tests/exporters/onnx/test_families_onnx.py``, so a cell that says "yes" where it is not cannot stay: its test
fails.  ``tests/models/test_families_table.py`` compares the page.
"""

from __future__ import annotations

from pathlib import Path

import zoo
import zoo_onnx

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: made by tests/support/families_table.py -->", "<!-- end of table -->"
NOT_APPLICABLE = "-"


def cells(specimen: zoo.Specimen) -> dict[str, str]:
    """Column to "yes", "-" (does not apply), how, or why not."""
    return {
        # The layers of ALBERT are one module, which no hook can pass over; a test of its own lowers the count instead.
        "passed over": "lower count" if specimen.name.startswith("albert") else "yes",
        "reload": "yes",
        "window + 64": "yes" if specimen.window is not None else NOT_APPLICABLE,
        "cache": "yes" if specimen.generates else NOT_APPLICABLE,
        "ONNX": _onnx(specimen),
    }


def _onnx(specimen: zoo.Specimen) -> str:
    if specimen.name in zoo_onnx.REFUSED:
        return f"no: {zoo_onnx.REFUSED[specimen.name].reason}"
    if specimen.group != "decoder":
        return "forward"
    return "forward: its state is not keys and values" if specimen.name in zoo_onnx.WITHOUT_CACHE else "cached"


def table() -> str:
    """The table as Markdown."""
    columns = list(cells(zoo.specimens()[0]))
    lines = [f"| family | kind | layers kept | {' | '.join(columns)} |", f"|{'---|' * (3 + len(columns))}"]
    for specimen in zoo.specimens():
        for side, keep in specimen.keep.items():
            name = specimen.name if side == "layers" else f"{specimen.name}, {side}"
            found = cells(specimen)
            kept = ", ".join(map(str, keep))
            lines.append(f"| {name} | {specimen.group} | {kept} | {' | '.join(found[c] for c in columns)} |")
    return "\n".join(lines)


def page_with(new: str) -> str:
    """The page with its table replaced."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with(table()), encoding="utf-8")
