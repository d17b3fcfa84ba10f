"""Draws the README's figure from the JSON of bench/decode.py: time of a decode step against context."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def draw(report: dict, to: Path) -> None:
    """One panel per dtype: milliseconds against context, one line per method."""
    keys = "clustered" if any(row["keys"] == "clustered" for row in report["rows"]) else report["rows"][0]["keys"]
    rows = [row for row in report["rows"] if row["keys"] == keys]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = plt.subplots(1, len(dtypes), figsize=(max(7, 4.5 * len(dtypes)), 3.8), sharey=True, squeeze=False)
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            line = [row for row in rows if (row["dtype"], row["method"]) == (dtype, method)]
            panel.loglog([row["context"] for row in line], [row["ms"] for row in line], "o-", label=method, base=2)
        panel.set_title(dtype)
        panel.set_xlabel("context, tokens")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms per step")
    panels[0][0].set_yscale("log", base=10)
    panels[0][-1].legend(fontsize=8)
    shape, where = report["shape"], report["machine"]
    figure.suptitle(
        f"{shape['heads']} query heads, {shape['kv_heads']} KV heads of {shape['head_dim']}, batch {shape['batch']}, "
        f"{keys} keys\n{where.get('gpu') or where['cpu'] + ', ' + str(where['threads']) + ' threads'}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(to, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("json", type=Path, nargs="?", default=HERE / "results" / "cpu.json")
    parser.add_argument("--out", type=Path, help="picture to write; default: beside the JSON")
    args = parser.parse_args()
    if not args.json.is_file():
        parser.error(f"expected a JSON file of bench/decode.py, got {args.json}")
    report = json.loads(args.json.read_text())
    if "method" not in report["rows"][0]:
        parser.error(f"expected the rows of bench/decode.py, got {args.json} with {list(report['rows'][0])}")
    draw(report, args.out or args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
