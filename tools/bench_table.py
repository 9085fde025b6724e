"""What ``tools/bench.py`` prints, the csv in ``data/bench/`` and the table in ``docs/performance.md``."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import pandas as pd
import torch

from patchsae.weights.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
#: Row -> title, what is counted and the unit of its rate, and what limits our side.
ROWS = {
    "statistics": ("Statistics, reference images and class counts", "images", "images/s",
                   "matrix products: blocks below the cut and one encoding"),
    "sae-step": ("Training step of the autoencoder, ghost gradients on", "tokens", "tokens/s",
                 "one dense product to find the active latents, then memory: weights, gradients and Adam's moments"),
    "tower": ("Vision tower below the cut", "images", "images/s", "matrix products of its blocks"),
    "from-images": ("Training step from uint8 images", "tokens", "tokens/s", "the tower and the step, in turn"),
}
OTHERS = ("overcomplete", "sae-lens")


def lines(found: dict[str, dict], size: dict) -> str:
    """``BENCH name value unit`` and ``RATIO name times against`` for everything that was measured."""
    text = []
    if "roofline" in found:
        units = {"bandwidth": "GB/s"}
        text += [f"BENCH {name} {value:.1f} {units.get(name, 'GFLOP/s')}" for name, value in found["roofline"].items()
                 if isinstance(value, float)]
    for side, values in found.items():
        if "missing" in values:
            text.append(f"BENCH {side} - not installed ({values['missing']})")
        elif "seconds" in values:
            text.append(f"BENCH {side} {values['seconds']:.3f} seconds")
            text.append(f"BENCH {side}-rate {rate(side, values, size):.1f} {_row(side)[2]}")
            if "memory" in values:
                text.append(f"BENCH {side}-memory {values['memory']:.0f} MiB")
            if "losses" in values:
                text.append(f"BENCH {side}-loss {' '.join(f'{loss:.7g}' for loss in values['losses'])}")
    for row in ROWS:
        for other, name in (("plain", "published-way"), *((name, name) for name in OTHERS)):
            if (times := _ratio(found, row, other)) is not None:
                text.append(f"RATIO {row if other == 'plain' else f'{row}-{other}'} {times:.2f} {name}")
    if (times := _ratio(found, "from-images", "two")) is not None:
        text += [f"BENCH two-in-one-pass {times:.2f} times-one", f"RATIO one-pass {2 / times:.2f} one-after-the-other"]
    return "\n".join(text)


def _row(side: str) -> tuple:
    return next(row for name, row in ROWS.items() if side.startswith(name))


def rate(side: str, values: dict, size: dict) -> float:
    """Images or tokens per second."""
    return (size["images"] if _row(side)[1] == "images" else values["tokens"]) / values["seconds"]


def _ratio(found: dict, row: str, other: str) -> float | None:
    ours, theirs = (found.get(f"{row}-{side}", {}).get("seconds") for side in ("ours", other))
    return theirs / ours if ours and theirs else None


def least_seconds(row: str, size: dict, roofline: dict) -> float:
    """What our side would take if it ran its matrix products at the measured rate and the rest from memory at the
    measured bandwidth, and did nothing else."""
    tokens, width, latents = (size["side"] // 16) ** 2 + 1, size["width"], size["latents"]
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    tower = (size["blocks"] - 1) * block + 2 * tokens * width * 3 * 16**2
    encode = 2 * tokens * width * latents
    # Both weight matrices, their gradients and two moments are read, all but the gradients written.
    step = 7 * 4 * 2 * width * latents
    flops, bytes_ = {"statistics": (tower + encode, 0), "sae-step": (encode, step), "tower": (tower, 0),
                     "from-images": (tower + encode, step)}[row]
    peak = roofline.get("bfloat16", roofline["float32"])
    return size["images"] * flops / (1e9 * peak) + bytes_ / (1e9 * roofline["bandwidth"])


def rows(found: dict[str, dict], size: dict, device: str) -> pd.DataFrame:
    """The table: a row for each comparison of which both sides were measured."""
    table = []
    for name, (title, _, unit, limit) in ROWS.items():
        if _ratio(found, name, "plain") is None:
            continue
        ours, plain = found[f"{name}-ours"], found[f"{name}-plain"]
        row = {"row": title, "unit": unit, "ours": rate(name, ours, size), "published way": rate(name, plain, size),
               "times faster": _ratio(found, name, "plain"), "ours, seconds": ours["seconds"],
               "published way, seconds": plain["seconds"]}
        for other in OTHERS:
            values = found.get(f"{name}-{other}", {})
            row[other] = rate(name, values, size) if "seconds" in values else float("nan")
        if "roofline" in found:
            row["share of the machine"] = least_seconds(name, size, found["roofline"]) / ours["seconds"]
        table.append(row | {"what limits it": limit})
    return pd.DataFrame(table)


def machine(device: str, threads: int) -> str:
    """Date, device and versions, in one sentence."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {threads} threads"
    found = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers"))
    precision = "bfloat16 against float32 with TF32" if device == "cuda" else "float32 on both sides"
    return f"{datetime.date.today()}, {name}, {os.cpu_count()} CPU cores, {found}, {precision}."


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")


def write(table: pd.DataFrame, device: str, threads: int, docs: bool) -> None:
    """Write ``data/bench/<device>.csv`` and, if asked, the table into ``docs/performance.md``, between its markers."""
    said = machine(device, threads)
    path = ROOT / "data" / "bench" / f"{device}.csv"
    write_atomically(path, lambda temporary: table.assign(machine=said).to_csv(temporary, index=False))
    print(f"Written: data/bench/{device}.csv")
    if docs:
        page = ROOT / "docs" / "performance.md"
        text = between(page.read_text(), device, f"{said}\n\n{markdown(table)}")
        write_atomically(page, lambda temporary: temporary.write_text(text))


def markdown(table: pd.DataFrame) -> str:
    """The table as a page shows it."""
    def cell(value) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return str(value)

    body = [[cell(value) for value in row] for row in table.itertuples(index=False)]
    rule = ["---"] * len(table.columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(table.columns), rule, *body])


def between(page: str, name: str, text: str) -> str:
    """The page with other text between the markers ``<!-- name -->`` and ``<!-- end of name -->``."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if page.count(first) != 1 or page.count(last) != 1:
        raise ValueError(f"docs/performance.md lacks the markers of {name}; put {first.strip()} and {last} back.")
    return page[:page.index(first) + len(first)] + text + "\n" + page[page.index(last):]
