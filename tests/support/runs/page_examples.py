"""The examples of docs/extending.md: the text of each file, by its name."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "extending.md").read_text()
# A command of several lines is one.
PAGE = re.sub(r" \\\n +", " ", PAGE)
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
