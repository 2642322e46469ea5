"""The page of families says what the tests check, and nothing else."""

from __future__ import annotations

import families_table
import zoo
from sglp_deploy.models import FAMILIES


def test_the_table_in_the_documentation_is_the_one_the_tests_make() -> None:
    page = families_table.PAGE.read_text(encoding="utf-8")
    assert page == families_table.page_with(families_table.table()), "run: python tests/support/families_table.py"


def test_every_declared_family_has_a_row() -> None:
    types = {specimen.build().config.model_type for specimen in zoo.specimens()}  # type: ignore[union-attr]
    # Refused by its declaration: its blocks are written in code.
    assert set(FAMILIES) - types == {"mobilenet_v2"}
