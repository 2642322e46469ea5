"""A small general corpus where a package that brings one is installed: news, and articles of an encyclopedia.

gensim carries both for its own tests, under licences of their authors.  They are read where they lie, and nothing is
copied or passed on.
"""

from __future__ import annotations

import bz2
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from sglp_deploy.evidence.text import CalibrationSet

_NEWS = "lee_background.cor"
_ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHORTEST = 200  # characters of a paragraph; below it, it is a heading, a list's entry or a caption

_MARKUP = re.compile(r"'{2,}|^[*#:;]+ *|__[A-Z]+__", re.MULTILINE)
_SPACES = re.compile(r"[ \t]+")


def general_text() -> CalibrationSet | str:
    """News and articles, or the sentence that says why there are none."""
    folder = _folder()
    if folder is None or not ((folder / _NEWS).is_file() and (folder / _ARTICLES).is_file()):
        return (
            "the text 'general' comes with the package gensim, which is not installed here; the mix lacks it; pip "
            "install 'sglp-deploy[heal]'"
        )
    return CalibrationSet((*_news(folder / _NEWS), *_articles(folder / _ARTICLES)), "general:gensim")


def _folder() -> Path | None:
    found = importlib.util.find_spec("gensim")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / "test" / "test_data"


def _news(file: Path) -> Iterator[str]:
    """One document a line."""
    yield from (line.strip() for line in file.read_text(encoding="utf-8").splitlines() if len(line) >= _SHORTEST)


def _articles(file: Path) -> Iterator[str]:
    """The running text of each article, a few paragraphs at a time, so that draws mix the articles."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(file) as pages:
        for _title, text, _number in extract_pages(pages, ("0",)):
            paragraphs = [
                _SPACES.sub(" ", _MARKUP.sub("", paragraph)).strip()
                for paragraph in filter_wiki(text).split("\n")
                if len(paragraph) >= _SHORTEST and not paragraph.lstrip().startswith(("|", "!", "{", "=", "*", "#"))
            ]
            for start in range(0, len(paragraphs), 4):
                yield "\n\n".join(paragraphs[start : start + 4])
