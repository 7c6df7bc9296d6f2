"""results/LOG.md lists every departure from the paper or the official code, and nothing else."""

import re
from collections import Counter

from helpers import ROOT


def test_every_departure_is_in_the_table_of_the_log():
    """As many `DEPARTURE:` tags in each file as rows that name it."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "minvqgan").rglob("*.py")]
    tags = {str(path.relative_to(ROOT)): path.read_text().count("DEPARTURE:") for path in sources}
    lines = (ROOT / "results" / "LOG.md").read_text().splitlines()
    rows = Counter(match[1] for line in lines if (match := re.match(r"\| `([\w/]+\.py)` \|", line)))
    assert dict(rows) == {name: count for name, count in tags.items() if count}
