"""A sheet of search results: each query with the pictures that resemble it most."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps


_TILE = 128
_CAPTION = 14
_GAP = 6
_LONGEST_CAPTION = 20


class FoundPicture(NamedTuple):
    """A picture with what is written under it."""

    image: Image.Image
    caption: str


def draw_retrieval_sheet(rows: Sequence[Sequence[FoundPicture]]) -> Image.Image:
    """Draw a row a query: the query, set apart, and its results.

    Args:
        rows: At least one; the first picture of each is the query.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("There is no query to draw.")
    columns = max(len(row) for row in rows)
    width = columns * (_TILE + _GAP) + 3 * _GAP
    height = len(rows) * (_TILE + _CAPTION + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = _GAP + number * (_TILE + _CAPTION + _GAP)
        for column, found in enumerate(row):
            left = _GAP + column * (_TILE + _GAP) + (2 * _GAP if column else 0)
            tile = ImageOps.pad(found.image, (_TILE, _TILE), color="white")
            sheet.paste(tile, (left, top))
            if not column:
                corners = (left - 2, top - 2, left + _TILE + 1, top + _TILE + 1)
                draw.rectangle(corners, outline="orange", width=2)
            draw.text((left, top + _TILE + 1), _shorten(found.caption), fill="black")
    return sheet


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_CAPTION else "..." + text[3 - _LONGEST_CAPTION :]
