"""What follows from the measurements: laws fitted to them, and whether the promises hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_parts.scale import Scale, label

Entries = Mapping[str, dict[str, Any]]
Points = Sequence[tuple[float, float]]

FASTER, SMALLER, FLAT, SHARE = 21, 10, 1.05, 0.5
_WAYS = ("recorded", "fixed", "eager")  # what decoding is judged by, the first that was measured


def fit_growth(points: Points) -> tuple[float, float]:
    """Least squares of t = a·n + b·n².

    Raises:
        ValueError: fewer than two lengths.
    """
    return _solved([(n, n * n, t) for n, t in _distinct(points)])


def fit_line(points: Points) -> tuple[float, float]:
    """Least squares of t = c + d·n.

    Raises:
        ValueError: fewer than two lengths.
    """
    return _solved([(1.0, n, t) for n, t in _distinct(points)])


def _distinct(points: Points) -> Points:
    if len({n for n, _ in points}) < 2:
        raise ValueError(f"points must be of at least 2 lengths, got {len({n for n, _ in points})}")
    return points


def _solved(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The x, y for which x·p + y·q comes closest to t over all rows (p, q, t)."""
    # Lengths and their squares are far apart; both scaled to 1, nothing is lost.
    one, two = (max(abs(row[i]) for row in rows) for i in (0, 1))
    scaled = [(p / one, q / two, t) for p, q, t in rows]
    pp, qq, pq = (sum(r[i] * r[j] for r in scaled) for i, j in ((0, 0), (1, 1), (0, 1)))
    pt, qt = (sum(r[i] * r[2] for r in scaled) for i in (0, 1))
    determinant = pp * qq - pq * pq
    return (
        (pt * qq - qt * pq) / determinant / one,
        (qt * pp - pt * pq) / determinant / two,
    )


def full_attention_law(entries: Entries, shape: str) -> dict[str, Any] | None:
    """Time and memory of the backbone's own attention by its measured lengths.

    Returns:
        Seconds a·n + b·n² and bytes c + d·n; None where fewer than two lengths were read whole.
    """
    known = [
        entry
        for name, entry in entries.items()
        if name.startswith(f"prefill/{shape}/backbone/") and entry.get("whole")
    ]
    if len({entry["tokens"] for entry in known}) < 2:
        return None
    a, b = fit_growth([(entry["tokens"], entry["seconds"]) for entry in known])
    c, d = fit_line([(entry["tokens"], entry["peak_bytes"]) for entry in known])
    lengths = [entry["tokens"] for entry in known]
    return {"a": a, "b": b, "c": c, "d": d, "fitted": True, "lengths": lengths}


def conclusions(entries: Entries, scale: Scale, shapes: Sequence[str]) -> dict[str, Any]:
    """What the file says beside the measurements: `laws` and `promises`."""
    laws = {shape: found for shape in shapes if (found := _at_a_million(entries, scale, shape))}
    promises = {
        "a million tokens in 1/21 of full attention's time": _promise(
            laws.get("4B", {}).get("time_ratio"), lambda x: x >= FASTER, scale
        ),
        "a million tokens in 1/10 of full attention's memory": _promise(
            laws.get("4B", {}).get("memory_ratio"), lambda x: x >= SMALLER, scale
        ),
        "reading at 50% of the matrix peak": _promise(
            _steady(entries, "prefill/4B/ours").get("share_of_peak"),
            lambda x: x >= SHARE,
            scale,
        ),
        "decoding after a million tokens as fast as after a thousand": _flat(entries, scale),
        "one exact step on ten million tokens": _record(entries, scale),
    }
    return {"laws": laws, "promises": promises}


def _steady(entries: Entries, begin: str) -> dict[str, Any]:
    """A chunk with a full memory: recorded where there are figures of that; {} where of neither."""
    return _ok(entries, f"{begin}/steady recorded") or _ok(entries, f"{begin}/steady") or {}


def _at_a_million(entries: Entries, scale: Scale, shape: str) -> dict[str, Any] | None:
    """Ours and full attention's at a million tokens, and where each figure is from."""
    begin = f"prefill/{shape}/ours"
    read, steady = _ok(entries, f"{begin}/{label(scale.million)}"), _steady(entries, begin)
    found: dict[str, Any] = {"tokens": scale.million}
    if read:
        found |= {"seconds": read["seconds"], "basis": read["basis"]}
    elif steady:
        chunks = scale.million / scale.comet.chunk_size
        found |= {"seconds": chunks * steady["seconds_per_chunk"], "basis": "flat law"}
    else:
        return None
    ours = read or steady
    found["peak_bytes"] = ours["peak_bytes"]
    law = full_attention_law(entries, shape)
    if law is None:
        return found
    n, width = scale.million, 2 if scale.paper else 4
    seconds = law["a"] * n + law["b"] * n * n
    # Reading whole, full attention also holds activations of the whole text, which a better reader
    # would not: the promise is held against its weights and its KV cache alone.
    fitted = law["c"] + law["d"] * n
    counted = ours["weights_bytes"] + scale.cache_bytes(shape, n, width)
    return found | {
        "full_attention": law,
        "full_attention_seconds": seconds,
        "full_attention_bytes_fitted": fitted,
        "full_attention_bytes_counted": counted,
        "time_ratio": seconds / found["seconds"],
        "memory_ratio": counted / found["peak_bytes"],
        "memory_ratio_fitted": fitted / found["peak_bytes"],
    }


def _flat(entries: Entries, scale: Scale) -> dict[str, Any]:
    """Decoding of one row, after a million tokens against after the fewest."""
    begin = "decode/4B/{}/batch 1/{}"
    for way in _WAYS:
        short, flat = (
            _ok(entries, begin.format(label(n), way)) for n in (scale.decoded[0], scale.million)
        )
        really = _ok(entries, begin.format(label(scale.million), way + " really read"))
        long = really or flat
        if long and short:
            ratio = long["ms_per_token"] / short["ms_per_token"]
            found = _promise(ratio, lambda x: x <= FLAT, scale)
            return found | {"way": way, "state": long["state"]}
    return _promise(None, bool, scale)


def _record(entries: Entries, scale: Scale) -> dict[str, Any]:
    done = _ok(entries, f"train/{scale.trained}/record")
    if done is None:
        return _promise(None, bool, scale)
    found = _promise(done["tokens"], lambda x: x >= scale.record, scale)
    return found | {"seconds": done["seconds"]}


def _promise(value: float | None, holds: Any, scale: Scale) -> dict[str, Any]:
    """A figure, and whether it holds; None where nothing was measured at the paper's sizes."""
    judged = value is not None and scale.paper
    return {"value": value, "met": bool(holds(value)) if judged else None}


def _ok(entries: Entries, name: str) -> dict[str, Any] | None:
    entry = entries.get(name)
    return entry if entry is not None and entry["status"] == "ok" else None
