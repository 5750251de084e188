"""The app that README.md begins with, as a file that a server can run.

What lives here is only the reading: the first block of a language, exactly as it stands in the page, so that what
people type is what is tested.
"""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def first_block(language: str = "python", text: str | None = None) -> str:
    """Return the first fenced block of ``language``. Raises `LookupError` where there is none."""
    page = README.read_text("utf-8") if text is None else text
    found = re.search(rf"^```{language}\b[^\n]*\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    if found is None:
        raise LookupError(f"README.md has no {language} block")
    return found[1]


def write_app(folder: Path) -> Path:
    """Write the app of the README to ``folder/app.py`` and return the folder, which is uvicorn's ``--app-dir``."""
    (folder / "app.py").write_text(first_block(), "utf-8")
    return folder
