"""The code and the model of examples/ that bench uses. No other module of bench imports from examples/."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "stdlib-entmax"
sys.path.append(str(EXAMPLES / "train"))

from calls import with_cache  # noqa: E402
from corpus import RELATED, SEPARATOR, default_source, files, held_out  # noqa: E402
from launches import fix_launches  # noqa: E402
from tasks import LINE, RECALL, draw, put  # noqa: E402
from watch import Watch  # noqa: E402

__all__ = [
    "LINE",
    "MODEL",
    "RECALL",
    "RELATED",
    "SEPARATOR",
    "Watch",
    "default_source",
    "draw",
    "files",
    "fix_launches",
    "held_out",
    "put",
    "with_cache",
]
