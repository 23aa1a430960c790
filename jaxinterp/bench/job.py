"""`jaxinterp bench`: measures subjects, prints tables, appends records, draws figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxinterp.bench import attacks, cam, device, dissect, effect, models, peers, records, scaling, train
from jaxinterp.bench import sweep as sweeps
from jaxinterp.bench.measure import Found, table
from jaxinterp.bench.setting import Setting, prepare
from jaxinterp.effect import Cell
from jaxinterp.network import suggest

SUBJECTS = ("attacks", "effect", "cam", "dissect", "models", "train", "scaling")
SWEPT = ("attacks", "effect", "cam", "models")
"""Subjects that can be swept over batch sizes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What each subject is asked beyond its setting.

    Attributes:
        specs: attacks as text; of scaling the first counts.
        cell: side of a cell in pixels, or its height and width; None: see `jaxinterp.bench.effect.bench`.
        images: of a dissection; None: four batches.
        node: layer of a dissection.
        devices: how many at most, for scaling; None means all.
        peers: compare with other libraries.
        against: the PyTorch original that peers run.
        sweep: try batch sizes up to the memory's limit.
        batches: the sizes to try; none: from 1 on, doubling.
        largest: no larger batch.
        patience: seconds that a batch may take before the sweep ends.
        memory: bytes that programs may take; None asks the device.
    """

    specs: tuple[str, ...] = ()
    cell: Cell | None = None
    images: int | None = None
    node: str | None = None
    devices: int | None = None
    peers: bool = False
    against: str = "torchvision"
    sweep: bool = False
    batches: tuple[int, ...] = ()
    largest: int | None = None
    patience: float = 10.0
    memory: int | None = None


def run(
    subjects: Sequence[str],
    setting: Setting,
    options: Options,
    out: Path | None,
    *,
    command: str = "",
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measures subjects, one after the other.

    Args:
        subjects: some of `SUBJECTS`.
        setting: the network, and how it is measured.
        options: see `Options`.
        out: a folder: bench.jsonl gets a line for every subject and every sweep, SUBJECT-*.png are drawn anew. None
            writes nothing.
        command: goes into the records, so that they can be made again.
        say: is told what was found, line by line.

    Returns:
        What the records hold of each subject and sweep.

    Raises:
        ValueError: an unknown subject, an argument out of range; on the way, a sweep whose first batch does not fit.
        OSError: the results cannot be written.
    """
    _check(subjects, setting, options)
    there = _peers(setting, options, say) if options.peers else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    say(_headline(setting))
    for form in setting.forms:
        peak = setting.peak(form)
        say(
            f"{form}: at most {peak.flops / 1e9:,.0f} GFLOP/s and {peak.bandwidth / 1e9:,.0f} GB/s, {peak.source}; "
            f"above {peak.ridge:.1f} FLOP/B arithmetic is the limit"
        )
    written = []
    for subject in subjects:
        compared = there if there is not None and subject in ("attacks", "cam") else None
        asked = setting if compared is None else compared.setting
        found = _subject(subject, asked, options, compared)
        for line in _lines(subject, found):
            say(line)
        record = {
            "command": command,
            **asked.record(),
            "results": found.rows,
            "changes": found.changes,
            "notes": found.notes,
            **found.more,
        }
        if compared is not None:
            record["peers"] = peers.versions()
        json.dumps(record)  # what cannot be recorded is found before anything is written
        written.append(record)
        if out is not None:
            records.append(out / "bench.jsonl", f"bench {subject}", record)
            for path in _draw(subject, found, asked, out):
                say(f"drew {path}")
        if options.sweep and found.trial is not None:
            written.append(_sweep(subject, found, asked, options, out, command, say))
    return written


def _sweep(
    subject: str,
    found: Found,
    setting: Setting,
    options: Options,
    out: Path | None,
    command: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A record of its own, so that what was measured before is written when a sweep, which takes long, is stopped."""
    assert found.trial is not None
    say(f"  batch sizes, {found.swept}:")
    unit = found.rows[0]["unit"]
    swept = sweeps.sweep(
        found.trial,
        limit=device.memory_limit() if options.memory is None else options.memory,
        largest=options.largest,
        seconds=options.patience,
        rounds=setting.rounds,
        batches=options.batches,
        told=lambda row: [say(f"    {line}") for line in sweeps.lines(row, unit)],
    )
    say(f"    {sweeps.ending(swept)}")
    form = found.form or setting.forms[0]
    record = {"command": command, **setting.record(), "swept": found.swept, "swept format": form}
    record["sweep"] = dataclasses.asdict(swept)
    if out is not None:
        from jaxinterp import plots
        from jaxinterp.bench import figures

        records.append(out / "bench.jsonl", f"bench {subject}, batches", record)
        what = f"{found.swept}, {setting.network.name} at {setting.network.image_size} px, {form}"
        figure = figures.batches(swept.rows, what=what, unit=unit, limit=swept.limit)
        say(f"drew {plots.save(figure, out / f'{subject}-batches.png', bits=8)}")
    return record


def _check(subjects: Sequence[str], setting: Setting, options: Options) -> None:
    """Raises ValueError for what any of the subjects would refuse, before the first is measured."""
    for subject in subjects:
        if subject not in SUBJECTS:
            raise ValueError(f"unknown subject {subject!r}{suggest(subject, SUBJECTS)}")
    if options.largest is not None and options.largest < 1:
        raise ValueError(f"--largest must be at least 1, got {options.largest}")
    if any(batch < 1 for batch in options.batches):
        raise ValueError(f"--batches must be at least 1, got {' '.join(map(str, options.batches))}")
    if options.batches and options.largest is not None and min(options.batches) > options.largest:
        raise ValueError(f"--batches: none is as small as --largest {options.largest}")
    if options.batches and not options.sweep:
        raise ValueError("--batches goes with --sweep")
    if not options.patience > 0:
        raise ValueError(f"--patience must be positive, got {options.patience} seconds")
    if options.memory is not None and options.memory < 1:
        raise ValueError(f"--memory must be positive, got {options.memory} bytes")
    if options.sweep and not set(subjects) & set(SWEPT):
        raise ValueError(f"--sweep goes with {', '.join(SWEPT)}, not with {', '.join(subjects)}")
    if options.peers and not {"attacks", "cam"} & set(subjects):
        raise ValueError(f"--peers goes with attacks and cam, not with {', '.join(subjects)}")
    attacks.choose(options.specs)
    if "effect" in subjects:
        effect.grid(setting, options.cell)
    if "dissect" in subjects:
        dissect.check(setting, _images(setting, options), options.node)
    if "scaling" in subjects:
        scaling.check(options.devices)


def _images(setting: Setting, options: Options) -> int:
    return 4 * setting.batch if options.images is None else options.images


def _peers(setting: Setting, options: Options, say: Callable[[str], None]) -> peers.Peers | None:
    missing = peers.missing()
    for package, what in missing.items():
        say(f"peer {package}: {what}")
    if "torch" in missing or len(missing) == len(peers.PACKAGES):
        say("no peer can run: measured without any")
        return None
    found = peers.Peers(setting, options.against)
    say(f"peers on the weights of {options.against}: logits differ by {found.difference():.1e} of the largest")
    return found


def _subject(subject: str, setting: Setting, options: Options, compared: peers.Peers | None) -> Found:
    if subject == "attacks":
        theirs = None if compared is None else compared.attacks
        return attacks.bench(setting, options.specs, peers=theirs)
    if subject == "effect":
        return effect.bench(setting, options.cell)
    if subject == "cam":
        return cam.bench(setting, peers=None if compared is None else compared.maps())
    if subject == "dissect":
        return dissect.bench(setting, _images(setting, options), options.node)
    if subject == "train":
        return train.bench(setting)
    if subject == "models":
        return models.bench(setting)
    return scaling.bench(setting, options.specs, options.devices)


def _headline(setting: Setting) -> str:
    size = setting.network.image_size
    return (
        f"{setting.network.name} ({setting.weights} weights), batch {setting.batch} at {size} px, "
        f"{jax.local_device_count()} x {_device()}, {setting.rounds} rounds; medians (quartiles)"
    )


def _device() -> str:
    """What a person calls the devices."""
    kind = jax.devices()[0].device_kind
    return records.machine()["cpu"] or kind if kind == "cpu" else kind


def _lines(subject: str, found: Found) -> list[str]:
    lines = ["", subject, *(f"  {line}" for line in table(found.rows))]
    if any(row["compile"]["from cache"] for row in found.rows):
        lines.append("  * some programs were read from the persistent compilation cache")
    used = found.rows[-1]["memory"]
    lines.append(f"  peak memory of the {used['of']} since it began: {used['peak'] / 2**20:,.0f} MiB")
    if not any("joules" in row for row in found.rows):
        lines.append("  energy: this device does not tell")
    for row in found.rows:
        if "joules" in row:
            lines.append(f"  {row['name']}: {row['joules']['of a unit of work']:.3g} J for one of its {row['unit']}")
    for row in found.rows:
        if "over" in row:
            o = row["over"]
            times = "" if o["times"] == 1 else f"{o['times']:g} x "
            lines.append(
                f"  {row['name']} / ({times}{o['what']}): {o['median']:.3f} ({o['low']:.3f} to {o['high']:.3f})"
            )
        if "over gradients" in row:
            lines.append(
                f"  {row['name']}: {row['over gradients']:.3f} of a gradient for a step, success {row['success']:.0%}"
            )
    if subject == "scaling":
        lines += [f"  {line}" for line in scaling.lines(found)]
    for form, change in found.changes.items():
        lines.append(f"  what {form} changes, compared with {change['than']}:")
        lines += [f"    {line}" for line in _change_lines(change)]
    return [*lines, *(f"  note: {note}" for note in found.notes)]


def _change_lines(change: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in change.items():
        if key == "than":
            continue
        if isinstance(value, dict):
            lines.append(f"{key}: " + ", ".join(f"{name} {_value(name, x)}" for name, x in value.items()))
        else:
            lines.append(f"{key}: {_value(key, value)}")
    return lines


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1e}" if "difference" in name else f"{value:.2%}"


def _draw(subject: str, found: Found, setting: Setting, out: Path) -> list[Path]:
    from jaxinterp import plots
    from jaxinterp.bench import figures

    kind = _device()
    drawn = {}
    peaks = {form: dataclasses.asdict(setting.peak(form)) for form in setting.forms}
    roof = None if subject == "scaling" else figures.roofline(found.rows, peaks, device=kind)
    if roof is not None:
        drawn["roofline"] = roof
    if subject == "scaling":
        what = f"{found.more['attack']}, {setting.network.name} at {setting.network.image_size} px, {setting.forms[0]}"
        drawn["devices"] = figures.scaling(found.rows, what=what, device=kind)
    return [plots.save(figure, out / f"{subject}-{name}.png", bits=8) for name, figure in drawn.items()]


__all__ = ["SUBJECTS", "Options", "prepare", "run"]
