"""Put the table of verdicts into README.md, from figures/mini/verdicts.csv, which notebook 10 writes."""

import sys
from pathlib import Path

import pandas as pd

from patchsae.studies.verdicts import as_markdown

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- verdicts -->\n", "<!-- end of verdicts -->"


def page(text: str) -> str:
    """README with the table as it is now."""
    before, rest = text.split(BEGIN)
    table = as_markdown(pd.read_csv(ROOT / "figures" / "mini" / "verdicts.csv"))
    return f"{before}{BEGIN}{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{README.name} is written\n")
