"""What readings of V-PRUNE remove of photographs, as processors prepare them, and how much of that is padding.

The article prints removed shares and no formulas. So every reading of it, a change of the strategy's switches, is held
against these shares; and each against `unpad`, because a processor that pads makes patches that repeat each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from vtp_plugin.config import build
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies.study import some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.compare.calibration import Views
    from vtp_plugin.hosts.transformers.preparing import Preparation
    from vtp_plugin.strategy import PruningStrategy

LEADER, CONTROL = "vprune", "unpad"
OURS = "ours"  # the reading that is the strategy's defaults
ALL, PICTURE, PADDING = "all", "picture", "padding"  # removed of all patches, of those that are none of the padding,
CHUNK = 20  # and the share of what is removed that is padding. Pictures that are finished together
NEAR = 0.005  # of a width over a height, for proportions that are asked for: 500 x 376 is 4:3


# -- pictures ---------------------------------------------------------------------------------------------------------


def photographs(folder: str, proportions: str, most: int) -> list[tuple[str, Any]]:
    """Names and pictures: those of a folder and below, by default scikit-image's whose terms are known.

    `proportions`: such as 4:3, either way round; "" takes all. `most`: so many of them, spread; -1 for all.
    PruningError where there are none or not as many.
    """
    found = [pair for pair in _all(folder) if not proportions or _alike(pair[1], _ratio(proportions))]
    if not found:
        raise PruningError(f"no pictures{f' of {proportions}' * bool(proportions)} in {folder or 'scikit-image'}")
    return some(found, most, "most pictures")


def _all(folder: str) -> list[tuple[str, Any]]:
    from vtp_plugin.hosts.transformers.zero_shot import pictures_of
    from vtp_plugin.tiny import photos

    if not folder:
        return [(photo.file, photos.load(photo.file)) for photo in photos.PHOTOS]
    if not Path(folder).is_dir():
        raise PruningError(f"not a folder: {folder}")
    return [(str(path.relative_to(folder)), path) for path in pictures_of(Path(folder))]


def _ratio(proportions: str) -> float:
    width, _, height = proportions.partition(":")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise PruningError(f"proportions must be two numbers such as 4:3, got '{proportions}'")
    return int(width) / int(height)


def _alike(picture: Any, ratio: float) -> bool:
    from PIL import Image

    if isinstance(picture, Path):
        try:
            with Image.open(picture) as opened:  # its size stands in front; nothing is decoded
                width, height = opened.size
        except OSError:
            raise PruningError(f"not a picture that can be read: {picture}") from None
    else:
        width, height = picture.size
    return abs(max(width, height) / min(width, height) / max(ratio, 1 / ratio) - 1) <= NEAR


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(
    pictures: Sequence[tuple[str, Any]],
    processors: Mapping[str, Mapping[str, Mapping[str, Any]]],
    thresholds: Sequence[float],
    once: Callable[[str, Callable[[], Any]], Any],
) -> dict[str, Any]:
    """Shares per processor and reading, by chi-square threshold: mean over the pictures and its standard error.

    `processors`: the readings that are asked of each, as changes of V-PRUNE's fields. `once` keeps finished pictures.
    """
    from vtp_plugin.hosts.transformers.preparing import prepared

    found = {}
    for number, (name, readings) in enumerate(processors.items()):
        prepare = prepared(name)
        rows = [
            row
            for start in range(0, len(pictures), CHUNK)
            for row in once(
                f"photographs-{number}-{start}",
                lambda chunk=pictures[start : start + CHUNK], prepare=prepare, readings=readings: [
                    shares(prepare, picture, readings, thresholds) for _, picture in chunk
                ],
            )
        ]
        color = prepare.padding
        found[name] = {"padding": color and list(color), CONTROL: spread([row[CONTROL] for row in rows])}
        found[name]["readings"] = {
            reading: {
                key: {what: spread([row[reading][key][what] for row in rows]) for what in (ALL, PICTURE, PADDING)}
                for key in map(text, thresholds)
            }
            for reading in readings
        }
    return {"names": [name for name, _ in pictures], "processors": found}


def shares(
    prepare: Preparation, picture: Any, readings: Mapping[str, Mapping[str, Any]], thresholds: Sequence[float]
) -> dict[str, Any]:
    """What is removed of one picture: by the control, and by every reading at every threshold."""
    from vtp_plugin.compare.calibration import kept, total

    views, control = prepare(picture), unpad(prepare)
    count, whole = total(views), kept(control, views)
    inside = [set(index.tolist()) for index in whole]
    size = sum(map(len, inside))
    found: dict[str, Any] = {CONTROL: 1 - size / count}
    for reading, fields in readings.items():
        found[reading] = {}
        for threshold in thresholds:
            strategy = build(LEADER, {**fields, "chi2_threshold": threshold})
            left = [set(index.tolist()) for index in kept(strategy, views)]
            removed, in_padding = count - sum(map(len, left)), count - size - _outside(left, inside)
            within = sum(map(len, kept([*control, strategy], views)))
            found[reading][text(threshold)] = {
                ALL: removed / count,
                PICTURE: 1 - within / size,
                PADDING: in_padding / removed if removed else None,
            }
    return found


def _outside(left: Sequence[set[int]], inside: Sequence[set[int]]) -> int:
    return sum(len(own - picture) for own, picture in zip(left, inside, strict=True))


def unpad(prepare: Preparation) -> list[PruningStrategy]:
    """The control for what a processor adds; nothing where it adds nothing."""
    from vtp_plugin.strategies.unpad import COLORS

    if prepare.padding is None:
        return []
    names = [name for name, color in COLORS.items() if color == prepare.padding]
    if not names:
        raise PruningError(f"{prepare.name} pads with the colour {prepare.padding}, which {CONTROL} does not know")
    return [build(CONTROL, {"color": names[0]})]


def calibrations(
    pictures: Sequence[tuple[str, Any]], processor: str, targets: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """The cosine threshold that comes nearest to a data set's first share, and what it removes at all thresholds."""
    from vtp_plugin.compare.calibration import nearest, removed_share
    from vtp_plugin.hosts.transformers.preparing import prepared

    prepare, found = prepared(processor), []
    seen: list[Views] = [prepare(picture) for _, picture in pictures]
    for data, printed in targets.items():
        first = next(iter(printed))
        fitted = nearest(LEADER, "cosine_threshold", at(first), seen, printed[first])
        fields = {"cosine_threshold": fitted.strategy.cosine_threshold}
        removed = {key: removed_share(build(LEADER, {**fields, **at(key)}), seen) for key in printed}
        found.append({"data": data, "targets": printed, **fields, "removed": removed, "remark": fitted.remark})
    return found


def at(chi2: str | float) -> dict[str, float]:
    return {"chi2_threshold": float(chi2)}


def text(threshold: float) -> str:
    """A threshold as the article's shares are keyed."""
    return f"{threshold:g}"


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and its standard error, of those that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": mean(known), "error": stdev(known) / sqrt(len(known)) if len(known) > 1 else 0.0}


# -- what it looks like -----------------------------------------------------------------------------------------------


def off(reading: Mapping[str, Any], targets: Mapping[str, Mapping[str, float]]) -> float:
    """Root of the mean squared difference to the printed shares, in points."""
    gaps = [100 * (reading[key][ALL]["mean"] - share) for each in targets.values() for key, share in each.items()]
    return sqrt(mean(gap**2 for gap in gaps))


def tables(results: Mapping[str, Any], targets: Mapping[str, Mapping[str, float]]) -> list[Table]:
    return [_padding(results, targets), _readings(results, targets)]


def _padding(results: Mapping[str, Any], targets: Mapping[str, Mapping[str, float]]) -> Table:
    """The defaults under every processor, beside the control and the article."""
    keys = list(next(iter(results["processors"].values()))["readings"][OURS])
    table = Table(["pictures", "removed by", *(f"chi2 {key}" for key in keys)], title="Removed of photographs")
    for data, printed in targets.items():
        table.add(
            data, "V-PRUNE, as printed", *(f"{100 * printed[key]:.1f}" if key in printed else "-" for key in keys)
        )
    for name, found in results["processors"].items():
        reading = found["readings"][OURS]
        table.add(name, "V-PRUNE", *(_share(reading[key][ALL]) for key in keys))
        if found["padding"] is None:
            continue
        table.add(name, f"{CONTROL}: the padding", *[_share(found[CONTROL])] * len(keys))
        table.add(name, "V-PRUNE, of what is not padding", *(_share(reading[key][PICTURE]) for key in keys))
        table.add(name, "share of V-PRUNE's saving that is padding", *(_share(reading[key][PADDING]) for key in keys))
    table.caption = (
        f"{len(results['names'])} pictures, prepared as the model's own image processor does; % of the patches (of "
        "their squares for qwen), mean over the pictures ± its standard error. V-PRUNE with its defaults."
    )
    return table


def _readings(results: Mapping[str, Any], targets: Mapping[str, Mapping[str, float]]) -> Table:
    """Every reading under the first processor, the nearest to the article marked."""
    name, found = next(iter(results["processors"].items()))
    keys = list(found["readings"][OURS])
    known = {data: printed for data, printed in targets.items() if set(printed) <= set(keys)}
    heads = [f"{what} {key}" for what in ("all,", "picture,") for key in keys]
    table = Table(["reading", *heads, "off by"], title=f"Readings of the article, prepared as {name}")
    for data, printed in known.items():
        table.add(f"{data}, as printed", *(f"{100 * printed[key]:.1f}" for key in printed), *[""] * len(keys), "")
    gaps = {reading: off(entry, known) for reading, entry in found["readings"].items()} if known else {}
    for reading, entry in found["readings"].items():
        values = [f"{100 * entry[key][what]['mean']:.1f}" for what in (ALL, PICTURE) for key in keys]
        table.add(reading, *values, f"{gaps[reading]:.1f}" if gaps else "-")
    order = sorted(gaps, key=gaps.__getitem__)[:3]
    nearest = f" The nearest: {', '.join(f'{reading} ({gaps[reading]:.1f})' for reading in order)}." if gaps else ""
    table.caption = (
        "% of all patches, and of those that are not padding, at each chi-square threshold. Off by: root mean square "
        f"of the differences to {' and '.join(known)} in points. Ours: the strategy's defaults; every other reading "
        f"changes what it names.{nearest}"
    )
    return table


def _share(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{100 * found['mean']:.1f} ± {100 * found['error']:.1f}"


def figure(results: Mapping[str, Any], targets: Mapping[str, Mapping[str, float]]) -> Figure:
    """Removed share over the threshold: every reading, and the article."""
    from matplotlib.figure import Figure

    (name, found), drawn = next(iter(results["processors"].items())), Figure(figsize=(6.5, 4), layout="constrained")
    axis = drawn.subplots()
    for reading, entry in found["readings"].items():
        style = {"color": "black", "zorder": 3} if reading == OURS else {"alpha": 0.5, "linewidth": 1}
        axis.plot(list(entry), [100 * entry[key][ALL]["mean"] for key in entry], marker=".", label=reading, **style)
    for data, printed in targets.items():
        axis.plot(list(printed), [100 * share for share in printed.values()], "*--", markersize=9, label=data)
    axis.set_xlabel("chi-square threshold")
    axis.set_ylabel(f"patches removed, %, prepared as {name}")
    drawn.legend(fontsize=6, loc="outside right upper")
    return drawn
