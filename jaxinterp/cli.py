"""The command line: `jaxinterp COMMAND`. Every command says what it does with --help."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from jaxinterp.explain import Pictures
    from jaxinterp.network import Network
    from jaxinterp.runs import Run


def explain(
    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    /,
    *,
    model: str = "efficientnet_lite0",
    attack: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    cell: int = 14,
    out: Path = Path("results/explain"),
    labels: str = "auto",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
) -> None:
    """Attack pictures and show what every perturbation does, cell by cell and on the class activation maps.

    Only pictures that the network classifies correctly are attacked, each towards a random class that depends on
    the seed and the picture's name. Results go to a directory: images.csv, cells.csv, summary.json, a figure for
    every picture and attack, and index.html. A run that was stopped continues when the same command is given again.

    Args:
        pictures: Picture files and folders; none means the 20 labelled ImageNet pictures of the `samples` extra.
        model: Network; its weights must have been converted with `jaxinterp convert`.
        attack: NAME or NAME:parameter=value,... such as cw:steps=200,kappa=2 or ifgsm:eps=4/255; may be given
            several times. Names: ifgsm, pgd, cw. Without it: ifgsm and cw.
        cell: Side of a cell, in pixels.
        out: Results directory.
        labels: Where labels come from: auto (labels file, class folders or file names where they fit, else the
            network's own prediction), names, predicted, or a file of lines "picture,label".
        limit: Use only the first so many pictures.
        seed: Of targets, random starts and shuffled controls.
        batch_size: Pictures that are attacked at once.
    """
    from tqdm import tqdm

    import jaxinterp
    from jaxinterp import attacks, effect
    from jaxinterp import explain as job
    from jaxinterp.attacks.driver import coerce
    from jaxinterp.attacks.spec import from_spec, parameters
    from jaxinterp.data import Crop, Folder, samples
    from jaxinterp.runs import Run
    from jaxinterp.weights import checkpoint

    _positive("--cell", cell)
    _positive("--batch-size", batch_size)
    if limit is not None:
        _positive("--limit", limit)
    chosen: dict[str, Any] = {}
    for spec in attack or ("ifgsm", "cw"):
        if spec in chosen:
            raise ValueError(f"--attack {spec} is given twice")
        chosen[spec] = from_spec(spec, attacks.ATTACKS, job.PRESETS)
        coerce(chosen[spec])
    network, params = jaxinterp.load(model)
    effect.grid(network.image_size, network.image_size, cell)
    crop = Crop(network.image_size, network.crop_pct, network.interpolation)
    if pictures:
        origin = {f for f in ("auto", "names", "predicted") if f == labels}
        source: Any = Folder(pictures, crop=crop, labels=labels if origin else Path(labels), classes=network.classes)
    else:
        source = samples("imagenet", crop=crop)
    count = len(source) if limit is None else min(limit, len(source))
    source_origin, ids = source.label_origin, source.ids[:count]
    config = {
        "command": "explain",
        "model": model,
        "weights": checkpoint.read_manifest(checkpoint.default_root() / model, name=model)["source"]["sha256"],
        "attacks": {name: {"attack": a.name, **parameters(a)} for name, a in chosen.items()},
        "cell": cell,
        "seed": seed,
        "batch_size": batch_size,
        "pictures": count,
        "pictures_sha256": job.pictures_digest(source, ids, source.labels[:count]),
    }
    run = Run(out, config)
    run.write_json("machine.json", job.machine())
    selected = job.Selection(source, tuple(range(count)), ids)

    print(f"{count} pictures; labels: {source_origin}", flush=True)
    with tqdm(total=1.0, unit="picture", bar_format="{desc}", leave=False) as bar:
        survey = job.survey(
            run,
            network,
            params,
            selected,
            seed=seed,
            batch_size=batch_size,
            progress=lambda what, done: bar.set_description_str(what),
        )
    _print_left_out(network, survey)
    if not len(survey.correct):
        raise ValueError("no picture is classified correctly, so there is nothing to attack")

    rows: list[dict[str, Any]] = []
    with tqdm(total=len(survey.correct), unit="picture", bar_format=_BAR) as bar:

        def progress(what: str, done: float) -> None:
            bar.set_description_str(what)
            bar.update(done)

        def finished() -> Iterator[tuple[str, dict[str, Any]]]:
            return job.parts(
                run,
                network,
                params,
                selected,
                survey,
                chosen,
                cell=cell,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )

        for name, arrays in finished():
            fresh = list(job.image_rows(network, name, arrays))
            _figures(run, network, name, arrays, fresh, cell)
            rows += fresh
        bar.set_description_str("done")

    order = {name: i for i, name in enumerate(chosen)}
    position = {name: i for i, name in enumerate(survey.ids)}
    rows.sort(key=lambda row: (position[row["id"]], order[row["attack"]]))
    run.write_table("images.csv", job.IMAGE_COLUMNS, rows)
    stored = job.stored_parts(run, chosen, survey, batch_size)
    run.write_table("cells.csv", job.CELL_COLUMNS, (r for n, a in stored for r in job.cell_rows(n, a, cell)))
    summary = job.summarise(rows, list(chosen), seed=seed)
    run.write_json("summary.json", job.as_json(summary))
    page = _page(run, network, source_origin, survey, rows, summary, chosen, config, batch_size)
    _print_summary(summary)
    print(f"\n{page}: open it in a browser; tables: {run.directory}/images.csv, cells.csv")


_BAR = "{l_bar}{bar}| {n:.1f}/{total} pictures [{elapsed}<{remaining}]"


def convert(names: tyro.conf.Positional[tuple[str, ...]], /, *, from_file: Path | None = None, force: bool = False):
    """Convert published PyTorch weights to a verified Orbax checkpoint in ckpts/.

    Neither torch nor an unpickler is used: the file is read as data, and a name in it that is not a tensor's is
    refused. Every tensor must be there, be expected, and have the right shape.

    Args:
        names: Networks, such as efficientnet_lite0.
        from_file: A PyTorch state dict; without it the one in the installed weight package is taken.
        force: Convert again even where a sound checkpoint of the same file exists.
    """
    from jaxinterp import weights
    from jaxinterp.weights import checkpoint

    if not names:
        raise ValueError("name at least one network, such as efficientnet_lite0")
    if from_file is not None and len(names) > 1:
        raise ValueError("--from-file goes with one network")
    for name in names:
        folder = weights.convert(name, file=from_file, force=force)
        manifest = checkpoint.read_manifest(folder, name=name)
        source = manifest["source"]
        recognised = "a known file" if source["known"] else "not among the known files"
        print(f"{name}: {len(manifest['tensors'])} tensors from {source['file']} ({recognised}) -> {folder}")


def main(args: list[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 for bad input or a full disk, 130 when interrupted."""
    commands = {"explain": explain, "convert": convert}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="jaxinterp", description=_DESCRIPTION, args=args, sort_subcommands=False
        )
    except KeyboardInterrupt:
        print("\njaxinterp: stopped; the same command continues from the last finished part", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"jaxinterp: error: {_reason(error)}", file=sys.stderr)
        return 2
    return 0


_DESCRIPTION = (
    "What adversarial perturbations do to a network: which cells of a perturbation suppress the true class, \
which promote the target, and where they lie on the class activation maps."
)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}; what was finished is kept, and the same command continues from there"
    if isinstance(error, MemoryError):
        return "out of memory; a smaller --batch-size needs less"
    return str(error)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _print_left_out(network: Network, survey: Pictures) -> None:
    for name, reason in survey.damaged:
        print(f"  skipped {name}: {reason}")
    wrong = [i for i in range(len(survey.ids)) if survey.labels[i] != survey.predicted[i]]
    for i in wrong:
        seen, true = network.class_name(survey.predicted[i]), network.class_name(survey.labels[i])
        print(f"  not attacked {survey.ids[i]}: seen as {seen}, labelled {true}")
    print(
        f"{len(survey.correct)} of {len(survey.ids)} readable pictures are classified correctly and attacked"
        + (f"; {len(survey.damaged)} could not be read" if survey.damaged else "")
    )


def _figures(run: Run, network: Network, name: str, arrays: dict[str, Any], rows: list[dict[str, Any]], cell: int):
    from jaxinterp import explain as job
    from jaxinterp import plots

    for i, row in enumerate(rows):
        path = job.figure_path(run, name, row["id"])
        if not path.exists():
            plots.save(job.draw(network, name, arrays, i, row, cell), path)


def _page(run, network, origin, survey, rows, summary, chosen, config, batch_size) -> Path:
    from jaxinterp import explain as job
    from jaxinterp import plots, report

    columns = job.overview_columns(job.stored_parts(run, chosen, survey, batch_size))
    figures = run.directory / "figures"
    overview = []
    bars = {
        row["attack"]: {
            key.removeprefix("share_"): row[key].interval for key in job.SHARE_COLUMNS
        }
        for row in summary
        if row["share_balanced"].count
    }
    if bars:
        overview = [
            ("Shares of the kinds of cells, mean over pictures with 95 % interval", figures / "kinds.png"),
            ("Overall effect of a cell against the norm of its perturbation", figures / "effect_norm.png"),
            ("Ratio of promotion to suppression against the overall effect", figures / "ratio_effect.png"),
        ]
        plots.save(plots.kinds_bar(bars), overview[0][1])
        plots.save(plots.scatter_effect(columns.norms, columns.effects), overview[1][1])
        plots.save(plots.scatter_ratio(columns.effects, columns.ratios), overview[2][1])
    wrong = [i for i in range(len(survey.ids)) if survey.labels[i] != survey.predicted[i]]
    skipped = [(name, f"not readable: {reason}") for name, reason in survey.damaged] + [
        (
            survey.ids[i],
            f"not attacked: seen as {network.class_name(survey.predicted[i])}, "
            f"labelled {network.class_name(survey.labels[i])}",
        )
        for i in wrong
    ]
    return report.write(
        run.directory / "index.html",
        title=f"What perturbations do to {network.name}",
        facts={
            "network": network.name,
            "weights (sha256)": config["weights"],
            "pictures": f"{config['pictures']}, of which {len(survey.correct)} attacked",
            "labels": origin,
            **{f"attack {name}": str(a) for name, a in chosen.items()},
            "cell": f"{config['cell']} x {config['cell']} pixels",
            "seed": str(config["seed"]),
            **{k: v for k, v in job.machine().items() if k in ("jaxinterp", "jax", "devices")},
        },
        summary=[{k: (format(v) if hasattr(v, "count") else v) for k, v in row.items()} for row in summary],
        summary_columns=job.SUMMARY_COLUMNS,
        pictures=[
            {
                "id": row["id"],
                "attack": row["attack"],
                "true": row["label_name"],
                "target": row["target_name"],
                "success": row["success"],
                "facts": job.picture_facts(row),
                "figure": job.figure_path(run, row["attack"], row["id"]),
            }
            for row in rows
        ],
        notes=job.NOTES,
        overview=overview,
        skipped=skipped,
    )


def _print_summary(summary: list[dict[str, Any]]) -> None:
    from jaxinterp import explain as job

    def shown(value: Any, spec: str) -> str:
        if isinstance(value, float) and value != value:
            return "-"
        return format(value, spec) if not isinstance(value, str) else value

    print()
    for row in summary:
        print(row["attack"])
        for key, heading, spec in job.SUMMARY_COLUMNS[1:]:
            print(f"  {heading:<44} {shown(row[key], spec)}")


if __name__ == "__main__":
    sys.exit(main())
