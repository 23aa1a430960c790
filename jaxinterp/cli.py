"""The command line: `jaxinterp COMMAND`. Every command says what it does with --help."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxinterp import launch, processes
from jaxinterp.cellsize import CellSize, CellSizeOrPart


def explain(
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    model: str = "efficientnet_lite0",
    attack: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    cell: CellSize = 14,
    effect: str = "leave_one_out",
    scale: str = "logit",
    maps: str = "auto",
    faithfulness: bool = False,
    out: Path = Path("results/explain"),
    labels: str = "auto",
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    watermarks: Path | None = None,
) -> None:
    """Attack pictures and show what every perturbation does, cell by cell and on the class activation maps.

    Only pictures that the network classifies correctly are attacked, each towards a random class that depends on
    the seed and the picture's name. Results go to a directory: images.csv, cells.csv, summary.json, a figure for
    every picture and attack, and index.html. A run that was stopped continues when the same command is given again.

    Args:
        pictures: Picture files and folders, or one of samples:DATASET, tfds:NAME/SPLIT[:100], FILE.npz; none means
            the labelled pictures of the `samples` extra (20 of ImageNet).
        model: Network; its weights must have been converted with `jaxinterp convert`.
        attack: NAME or NAME:parameter=value,... such as cw:steps=200,kappa=2 or ifgsm:eps=4/255; may be given
            several times. `jaxinterp attack --list` explains them. Without it: ifgsm and cw.
        cell: Side of a cell in pixels, or HEIGHTxWIDTH.
        effect: What a cell does: leave_one_out, the paper's, compares the perturbation with what is left without the
            cell; add_one_in the original with what the cell makes of it alone; first_order estimates the first from
            gradients, all cells at once.
        scale: Of effects: logit, the paper's, log_softmax or softmax.
        maps: Class activation maps: cam, gradcam, gradcam++, xgradcam, hirescam, layercam, eigencam, scorecam or
            ablationcam; auto means cam where the network ends in global average pooling and one linear layer, else
            gradcam.
        faithfulness: Also measure whether the maps show what the network looks at: areas under deletion and insertion
            curves, and average drop, beside those of noise. 176 more forward passes for every picture and attack.
        out: Results directory.
        labels: Where labels come from: auto (labels file, class folders or file names where they fit, else the
            network's own prediction), names, predicted, or a file of lines "picture,label".
        data_dir: Where TensorFlow data sets were prepared.
        limit: Use only the first so many pictures.
        seed: Of targets, random starts and shuffled controls.
        batch_size: Pictures that are attacked at once.
        watermarks: Folder of class folders of pictures (DIR/CLASS/picture.jpg) that the attack watermark embeds;
            without it, pictures of noise.
    """
    from jaxinterp.effect import Definition
    from jaxinterp.explain import DEFAULT_ATTACKS
    from jaxinterp.explain import explain as job
    from jaxinterp.explain.tables import summary_lines

    found = job(
        pictures,
        model=model,
        specs=attack or DEFAULT_ATTACKS,
        cell=cell,
        definition=Definition(effect, scale),
        faithful=faithfulness,
        method=maps,
        out=out,
        labels=labels,
        data_dir=data_dir,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        watermarks=watermarks,
    )
    for line in summary_lines(found.summary):
        print(line)
    print(f"\n{found.page}: open it in a browser\n{out}/images.csv, {out}/cells.csv: the tables")


def attack(
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    model: str = "efficientnet_lite0",
    attack: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    targeted: bool = False,
    out: Path = Path("results/attack"),
    labels: str = "auto",
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    images: bool = True,
    watermarks: Path | None = None,
    list: bool = False,
) -> None:
    """Measure how well a network withstands attacks: success, robust accuracy, norms.

    Only pictures that the network classifies correctly are attacked. Results go to a directory: images.csv (a row for
    every picture and attack), summary.json, curves.png (success against budget), and every adversarial picture as
    float .npz and as 8-bit .png, whose success is counted again. Warnings tell when attacks may have failed for other
    reasons than robustness. A run that was stopped continues when the same command is given again, in the middle of
    an attack too, and ends with the same tables.

    Args:
        pictures: Picture files and folders, or a source as for --data; none means the labelled pictures of the
            `samples` extra.
        data: The same as a named option: files, folders, samples:DATASET, tfds:NAME/SPLIT[:100], FILE.npz.
        model: Network; its weights must have been converted with `jaxinterp convert`. Several as one, the mean of their
            logits: resnet50+2*vgg16; of their losses: resnet50+vgg16:combine=losses.
        attack: NAME or NAME:parameter=value,... such as pgd:norm=l2,eps=0.5; may be given several times. Without it:
            pgd. See --list.
        targeted: Attack each picture towards a random class, instead of away from its own.
        out: Results directory.
        labels: Where labels come from: auto, names, predicted, or a file of lines "picture,label".
        data_dir: Where TensorFlow data sets were prepared.
        limit: Use only the first so many pictures.
        seed: Of random starts and targets.
        batch_size: Pictures that are attacked at once.
        images: Store the adversarial pictures.
        watermarks: Folder of class folders of pictures (DIR/CLASS/picture.jpg) that the attack watermark embeds;
            without it, pictures of noise.
        list: Explain every attack and its parameters, and stop.
    """
    if list:
        from jaxinterp.attacks import ATTACKS, spec

        for line in spec.explain(ATTACKS):
            print(line)
        return
    from jaxinterp.robustness import DEFAULT_ATTACKS, evaluate, tables

    if pictures and data:
        raise ValueError("pictures are given both by themselves and with --data; give them once")
    found = evaluate(
        pictures or data,
        model=model,
        specs=attack or DEFAULT_ATTACKS,
        targeted=targeted,
        out=out,
        labels=labels,
        data_dir=data_dir,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        images=images,
        watermarks=watermarks,
    )
    for line in tables.lines(found.summary, clean=found.clean, predicted=int(found.pictures.unlabelled.sum())):
        print(line)
    print(f"\n{out}/images.csv: the table\n{found.curves}: success against budget")


def dissect(
    *,
    data: str | None = None,
    model: str = "efficientnet_lite0",
    node: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    out: Path = Path("results/dissect"),
    quantile: float = 0.005,
    union: Literal["image", "lite"] = "image",
    categories: tuple[str, ...] = (),
    split: str | None = None,
    limit: int | None = None,
    minimum: float = 0.04,
    top: int = 9,
    batch_size: int = 32,
    memory: float | None = None,
    form: Literal["auto", "gated", "dense"] = "auto",
    cache: Path | None = None,
    spill: bool = True,
    strict: bool = False,
    dry_run: bool = False,
    from_csv: Path | None = None,
) -> None:
    """Find which units of a network detect which concepts (network dissection, Bau et al. 2017).

    Each unit's feature map, where it is above the unit's threshold, is compared with the label maps of a Broden folder.
    Results go to a directory: tally.csv (the best concept of every unit in every category; one table a layer),
    iou.parquet (every IoU), summary.json (detectors and concepts under both conventions of counting), figures, a
    picture of every unit's top images, and index.html. A run that was stopped continues when the same command is given
    again, and ends with the same tables. All devices of this machine are used; the numbers do not depend on them.

    Args:
        data: broden:DIR, a folder in Broden's format. `jaxinterp broden make` builds one, `jaxinterp broden check`
            checks one.
        model: Network; its weights must have been converted with `jaxinterp convert`.
        node: Layer, such as features.28; may be given several times, they are computed together. `jaxinterp models
            NAME` lists them. Without it: the layer before global average pooling, or else the last with more than one
            position.
        out: Results directory.
        quantile: Share of all positions at which a unit exceeds its threshold.
        union: In which images a unit's activation counts for the union of a category: those in which the category
            occurs anywhere (image, the paper's definition), or under the unit's mask (lite, NetDissect-Lite's).
        categories: Categories to use, such as --categories object part; all by default.
        split: Use only the images of this split, such as val.
        limit: Use only the first so many images.
        minimum: IoU that a detector exceeds. Finished results are reported again under another one without computing.
        top: Images that are shown for each unit.
        batch_size: Images that are computed at once.
        memory: GiB that feature maps may take in memory; half of what is free by default. Those that do not fit are
            read again from the disk, or computed three times.
        form: How units and labels are compared; auto is gated on a CPU (only units that fire), else dense.
        cache: Folder of the decoded images, which several runs can share; OUT/cache by default.
        spill: Store feature maps on the disk until the run is finished, where there is room, so that a run that is
            stopped continues instead of beginning again.
        strict: End at the first image that cannot be read; otherwise such images are skipped, counted and listed.
        dry_run: Print what it would take (images, labels, memory, disk, operations, time), and write nothing.
        from_csv: A tally.csv, published or from here: print its detectors and concepts, and stop.
    """
    from jaxinterp import concepts
    from jaxinterp.concepts.tables import summary_lines

    if from_csv is not None:
        if data is not None:
            raise ValueError("--data and --from-csv: give one of them")
        for line in concepts.read_released(from_csv).lines(minimum):
            print(line)
        return
    if data is None:
        raise ValueError("--data: expected broden:DIR, a folder in Broden's format (or --from-csv, a tally.csv)")
    if memory is not None and not math.isfinite(memory):
        raise ValueError(f"--memory must be a number of GiB, got {memory}")
    job = concepts.prepare(
        data,
        model=model,
        nodes=node,
        quantile=quantile,
        union=union,
        categories=categories,
        split=split,
        limit=limit,
        batch_size=batch_size,
        top=top,
        memory=None if memory is None else int(memory * 2**30),
        form=form,
        strict=strict,
    )
    if dry_run:
        for line in concepts.estimate(job, out, spill):
            print(line)
        print("nothing was written")
        return
    found = concepts.dissect(job, out, cache=cache, spill=spill, minimum=minimum)
    for line in summary_lines(found.summary):
        print(line)
    print(f"\n{found.page}: open it in a browser\n{out}/tally*.csv, {out}/iou.parquet: the tables")


def convert(
    names: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    file: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Convert published weights to a verified Orbax checkpoint in ckpts/.

    Neither torch nor an unpickler is used: the file is read as data, and a name in it that is not a tensor's is
    refused. Every tensor must be there, be expected, and have the right shape. The number of classes is the file's.

    Args:
        names: Networks, such as efficientnet_lite0.
        file: A file of weights (.pth .pt .safetensors .npz .h5); without it the one in the installed weight package
            is taken.
        force: Convert again even where a sound checkpoint of the same file exists.
        dry_run: Print how the file's tensors map to the network, and write nothing.
    """
    from jaxinterp import weights
    from jaxinterp.weights import checkpoint, conversion

    if not names:
        raise ValueError("name at least one network, such as efficientnet_lite0")
    if file is not None and len(names) > 1:
        raise ValueError("--from goes with one network")
    for name in names:
        if dry_run:
            found = conversion.prepare(name, file)
            for line in conversion.table(found):
                print(line)
            found.params()  # refuses what does not fit
            print(f"{name}: {found.file.name} fits, with {found.classes} classes; nothing was written")
            continue
        folder = weights.convert(name, file=file, force=force)
        manifest = checkpoint.read_manifest(folder, name=name)
        source = manifest["source"]
        recognised = "a known file" if source["known"] else "not among the known files"
        print(f"{name}: {len(manifest['tensors'])} tensors from {source['file']} ({recognised}) -> {folder}")
        for note in manifest["notes"]:
            print(f"  {note}")


def models(name: tyro.conf.Positional[str | None] = None, /) -> None:
    """List the networks, or the nodes of one.

    Args:
        name: A network whose nodes are listed.
    """
    from jaxinterp import models as zoo
    from jaxinterp.weights import catalogue

    if name is not None:
        network = zoo.network(name)
        for node in network.nodes:
            print(node + ("   (class activation maps)" if node == network.cam_node else ""))
        return
    for line in catalogue.table():
        print(line)


def validate(
    names: tyro.conf.Positional[tuple[str, ...]], /, *, against: str | None = None, out: Path | None = None
) -> None:
    """Compare networks with their PyTorch originals: feature maps, logits and input gradients.

    Without --against the network runs with seeded weights and is compared with stored outputs of the original, which
    needs no torch. Differences are relative to the largest value.

    Args:
        names: Networks, such as resnet50.
        against: torchvision, or FILE.py:factory, a function that returns the PyTorch module; needs torch.
        out: Record the comparison, with versions and machine, in this JSON file.
    """
    import dataclasses
    import importlib.metadata
    import json

    from jaxinterp.runs import machine, replacing
    from jaxinterp.weights import validation

    if not names:
        raise ValueError("name at least one network, such as resnet50")
    record, failed = [], []
    for name in names:
        found = validation.against_torch(name, against) if against else validation.against_references(name)
        print(f"{name}, against {against or 'stored reference outputs'}")
        skipped = validation.left_out(name, found, live=against is not None)
        for line in validation.lines(found, skipped):
            print(f"  {line}")
        failed += [name for each in found if not each.passed][:1]
        compared = [{**dataclasses.asdict(c), "passed": c.passed} for c in found]
        record.append({"network": name, "comparisons": compared, "left_out": skipped})
    if out is not None:
        with replacing(out) as file:
            original = {"torch": importlib.metadata.version("torch")} if against else {}
            whole = {
                "against": against or "references",
                "machine": machine() | original,
                "matmul_precision": validation.PRECISION,
                "networks": record,
            }
            file.write((json.dumps(whole, indent=1) + "\n").encode())
    if failed:
        raise ValueError(f"differs from its original: {', '.join(failed)}")


def broden_make(
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    out: Path,
    textures: Path | None = None,
    scenes: Path | None = None,
    masks: Path | None = None,
    size: int = 224,
    crops: int = 12,
    seed: int = 0,
) -> None:
    """Build a folder in Broden's format from pictures.

    Every picture is cut into square crops. Colours come from their pixels (eleven names), textures and scenes from the
    names of folders, everything else from masks of your own. Without any pictures the set is made of those that come
    with the `samples` extra: twenty ImageNet pictures from foolbox (the rights are their photographers'; for research),
    and from scikit-image pictures in the public domain or under CC0, and three textures under CC0.

    Args:
        pictures: Picture files and folders.
        out: The folder to make; it must not exist, or be empty.
        textures: A folder of pictures of one texture each, in a sub-folder for every texture or with its name, such
            as brick.png and brick_2.png; the label holds for the whole image.
        scenes: A folder with a sub-folder of pictures for every scene; the label holds for the whole image.
        masks: A folder of PNGs of numbers, of their pictures' sizes: a/b.object.png for the picture a/b.jpg and the
            category object, and a/b.object.2.png where a pixel has a second label. The file names.csv in it says what
            they mean, with the columns category,value,name.
        size: Side of the images, in pixels; label maps have half of it.
        crops: Images that are cut from every picture.
        seed: Of the crops.
    """
    from tqdm import tqdm

    from jaxinterp import broden

    with tqdm(desc="cutting", unit="picture", leave=False) as bar:
        made = broden.make(
            pictures,
            out,
            textures=textures,
            scenes=scenes,
            masks=masks,
            size=size,
            crops=crops,
            seed=seed,
            progress=lambda done, total: _show(bar, done, total),
        )
    for name, reason in made.damaged:
        print(f"left out {name}: {reason}")
    labels = ", ".join(f"{category} {count}" for category, count in made.labels.items())
    print(f"{made.folder}: {made.images} images, {sum(made.labels.values())} labels ({labels})")


def broden_check(directory: tyro.conf.Positional[Path], /, *, tolerance: float = 0.0) -> None:
    """Report every inconsistency of a folder in Broden's format.

    All tables and pictures are read: missing files, wrong sizes, label numbers that no table has, duplicates, and
    frequencies and coverages that are not those of the files. The exit status is 2 where there is an error; notes are
    harmless.

    Args:
        directory: The folder.
        tolerance: By how much, relative to it, a stated frequency or coverage may differ from what is counted. The
            published sets need some, since theirs were counted before label maps were scaled down.
    """
    from tqdm import tqdm

    from jaxinterp import broden

    with tqdm(desc="checking", unit="image", leave=False) as bar:
        found = broden.check(directory, tolerance=tolerance, progress=lambda done, total: _show(bar, done, total))
    for note in found.notes:
        print(f"note: {note}")
    for error in found.errors:
        print(f"error: {error}")
    if found.errors:
        raise ValueError(f"{directory} has {len(found.errors)} {'error' if len(found.errors) == 1 else 'errors'}")
    print(f"{directory} is sound: {found.summary}")


def broden(
    *,
    command: Annotated[Any, tyro.conf.subcommand("make", constructor=broden_make)]
    | Annotated[Any, tyro.conf.subcommand("check", constructor=broden_check)],
) -> None:
    """Make or check folders in Broden's format, the data of network dissection.

    Broden (Bau, Zhou, Khosla, Oliva, Torralba, "Network Dissection", 2017) is a folder of images with maps of labels.
    """
    del command  # it has run


def bench(
    subjects: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    model: str = "efficientnet_lite0",
    weights: Literal["auto", "converted", "seeded"] = "auto",
    batch: int = 8,
    size: int | None = None,
    rounds: int = 5,
    formats: tuple[str, ...] = ("float32",),
    attack: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    cell: CellSizeOrPart = None,
    images: int | None = None,
    node: str | None = None,
    devices: int | None = None,
    sweep: bool = False,
    batches: tuple[int, ...] = (),
    largest: int | None = None,
    patience: float = 10.0,
    memory: float | None = None,
    peers: bool = False,
    against: str = "torchvision",
    compare: tuple[Path, Path] | None = None,
    out: Path = Path("results/bench"),
    seed: int = 0,
) -> None:
    """Measure how fast this machine attacks, explains and dissects, and how close that is to what it can do at most.

    Subjects are attacks, effect, cam, dissect, models, train and scaling; without any, all are measured. Everything is
    run once to compile it, which is timed apart, then in turn; what is printed are medians and quartiles, work a
    second, the share of the device's peak by the compiler's count of operations, and what limits it (arithmetic or
    memory).
    OUT/bench.jsonl gets a line for every subject, with versions, machine and this command; figures are drawn beside it.

    A small network in seconds: jaxinterp bench attacks scaling --model small_cnn --batch 4 --rounds 2 --devices 2

    Args:
        subjects: attacks, effect, cam, dissect, models, train, scaling.
        model: Network.
        weights: converted ones, seeded ones (made by rule; nothing needs to be there), or auto: converted where there
            are any. Images are made by rule.
        batch: Images in a batch.
        size: Side of the images in pixels; the network's own by default.
        rounds: How often everything is timed.
        formats: Any of float32, tf32 and bf16, such as --formats float32 bf16; what the others change in results is
            stated against the first.
        attack: Attacks to time, as in `jaxinterp attack`; may be given several times. Without it: pgd, mifgsm and cw.
        cell: Side of the cells of effects, in pixels, or HEIGHTxWIDTH.
        images: Images of the dissection, at least a batch; four batches by default. Broden has 63,305.
        node: Layer that is dissected.
        devices: Scaling goes from 1 to this many; all by default. A CPU is divided into as many virtual devices, which
            share its cores.
        sweep: Also try batch sizes up to the memory's limit, for attacks, effect, cam and models. Peers that attack run
            beside each.
        batches: The sizes to try; by default 1, 2, 4 and so on.
        largest: No larger batch than this.
        patience: No larger batch is tried after one that took longer, in seconds.
        memory: GiB that programs may take; by default what the device or the system has.
        peers: Also run torchattacks, foolbox (PGD) and pytorch-grad-cam where they are installed, on the same weights.
        against: Whose weights those are: torchvision, or FILE.py:factory, a function that returns the PyTorch module.
        compare: Two bench.jsonl files: print what changed from the first to the second, and stop.
        out: Folder of the records and figures.
        seed: Of attacks' randomness.
    """
    if compare is not None:
        from jaxinterp.bench import records

        if subjects:
            raise ValueError(f"--compare goes without subjects, got {' '.join(subjects)}")
        for line in records.compare(*compare):
            print(line)
        return
    if devices is not None:
        _divide_cpu(devices)
    from jaxinterp.bench import job

    options = job.Options(
        specs=attack,
        cell=cell,
        images=images,
        node=node,
        devices=devices,
        peers=peers,
        against=against,
        sweep=sweep,
        batches=batches,
        largest=largest,
        patience=patience,
        memory=None if memory is None else int(memory * 2**30),
    )
    setting = job.prepare(model, weights=weights, size=size, batch=batch, rounds=rounds, forms=formats, seed=seed)
    job.run(subjects or job.SUBJECTS, setting, options, out, command=_given())


def _divide_cpu(devices: int) -> None:
    """Makes a CPU `devices` devices, unless JAX has begun to use it or was told otherwise."""
    if devices < 1:
        raise ValueError(f"--devices must be at least 1, got {devices}")
    import jax

    if jax.config.values["jax_num_cpu_devices"] < 1 and "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        with contextlib.suppress(RuntimeError):  # in use already: what there is, is counted later
            jax.config.update("jax_num_cpu_devices", devices)


def _given() -> str:
    """The command line, for records."""
    return " ".join(["jaxinterp", *map(shlex.quote, sys.argv[1:])])


def serve(
    *,
    model: str = "efficientnet_lite0",
    ocr: bool = False,
    engine: Literal["auto", "rapidocr", "tesseract"] = "auto",
    host: str = "127.0.0.1",
    port: int = 8080,
    top: int = 5,
    key_variable: str | None = None,
    max_megabytes: float = 16.0,
    max_megapixels: float = 16.0,
    timeout: float = 30.0,
) -> None:
    """Serve a network, and an OCR engine, as a vision service over HTTP, until it is stopped with Ctrl-C.

    POST a picture to /labels for the most likely classes, to /text for what is written in it; GET / tells what is
    served. A picture of the network's size is taken as it is, another one is resized and cropped. jaxinterp.apis has
    the client. There is no encryption.

    Args:
        model: Network; its weights must have been converted with `jaxinterp convert`.
        ocr: Read text, too; takes RapidOCR (the `ocr` extra) or tesseract.
        engine: OCR engine; auto takes the first that is installed.
        host: Address to listen on; the default is reached from this machine only.
        port: 0 means any that is free.
        top: Number of labels in an answer.
        key_variable: Environment variable with the key that requests must bring (Authorization: Bearer KEY).
        max_megabytes: Of a picture's file, in 2^20 bytes.
        max_megapixels: Of a picture, in 2^20 pixels.
        timeout: Seconds that a client may take to send a picture.
    """
    from jaxinterp import apis
    from jaxinterp.weights import load

    reader = apis.ocr_engine(engine) if ocr else None
    network, params = load(model)
    service = apis.Server(
        apis.LocalVision(network, params, ocr=reader, top=top),
        host=host,
        port=port,
        about={"model": model, "size": network.image_size, "classes": network.num_classes, "text": ocr},
        key_variable=key_variable,
        timeout=timeout,
        max_bytes=int(max_megabytes * 2**20),
        max_pixels=int(max_megapixels * 2**20),
        say=print,
    )
    with service, contextlib.suppress(KeyboardInterrupt):
        kinds = "labels and text" if ocr else "labels"
        print(f"{model}: {kinds} at {service.url}; Ctrl-C ends it", flush=True)
        service.serve_forever()


def train(
    *,
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    held_out: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    model: str = "small_cnn",
    method: Literal["standard", "adversarial", "consistent"] = "consistent",
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    eps: float = 0.2,
    beta: float = 0.003,
    node: str | None = None,
    batch_norm: Literal["batch", "frozen"] = "batch",
    begin: Literal["random", "converted"] = "random",
    out: Path = Path("results/train"),
    labels: str = "auto",
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> None:
    """Train a network: on pictures, on adversarial pictures beside them, or so that both look alike inside.

    consistent minimises CE(f(x), y) + CE(f(x*), y) + beta ||phi(x) - phi(x*)||^2, with x* by FGSM at a random distance
    and phi the last feature map (arXiv 1708.05493, 1901.09035); adversarial is the same with beta 0; standard the first
    term alone. Results go to a directory: ckpts/MODEL, which every command takes with JAXINTERP_CKPTS=OUT/ckpts,
    training.csv and training.png (learning curves). All devices are used. A run that was stopped continues when the
    same command is given again, and ends with the same parameters.

    Args:
        data: Training pictures with labels: mnist5k:train, idx:FOLDER/train (MNIST, Fashion-MNIST),
            tfds:NAME/SPLIT, FILE.npz, class folders; may be given several times. Without it: mnist5k:train.
        held_out: Pictures on which accuracy is measured after every epoch, the same kinds.
        model: Network.
        method: standard, adversarial or consistent.
        epochs: How often to go through the pictures.
        batch_size: Pictures in a batch, on all devices together.
        lr: Highest step of Adam.
        weight_decay: Of AdamW.
        eps: Largest distance of an adversarial picture, in pixel units of [0, 1].
        beta: Weight of the distance between feature maps, a sum over all their values: larger maps want a smaller one.
            With 0.1 small networks collapse to a constant.
        node: The feature map that is made consistent; the last one by default.
        batch_norm: By the batch's statistics, or frozen as it is everywhere else.
        begin: With random parameters, or those of `jaxinterp convert`.
        out: Results directory.
        labels: Where labels come from, as in `jaxinterp attack`.
        data_dir: Where TensorFlow data sets were prepared.
        limit: Use only the first so many pictures.
        seed: Of the parameters, the order and the distances.
    """
    from jaxinterp.training import job

    recipe = job.Recipe(
        method=method,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        beta=beta,
        node=node,
        batch_norm=batch_norm,
        seed=seed,
    )
    found = job.train(
        data or ("mnist5k:train",),
        held_out=held_out or (None if data else ("mnist5k:test",)),
        model=model,
        recipe=recipe,
        out=out,
        begin=begin,
        labels=labels,
        data_dir=data_dir,
        limit=limit,
    )
    for name, value in found.fitted.history[-1].items():
        print(f"{name:<32}{value:.4f}")
    print(f"\n{found.folder}: the network\n{out}/training.csv, {out}/training.png: learning curves")


def _show(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def main(args: list[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 for bad input or a full disk, 130 when interrupted."""
    commands = {
        "explain": explain,
        "attack": attack,
        "dissect": dissect,
        "convert": convert,
        "models": models,
        "validate": validate,
        "broden": broden,
        "bench": bench,
        "serve": serve,
        "train": train,
    }

    def run(words: list[str]) -> None:
        from jaxinterp import precision

        chosen, rest = _taken("--precision", words)
        if processes.current().count > 1 and rest and rest[0] in commands and rest[0] not in _SHARED:
            raise ValueError(f"--distributed: {rest[0]} is not shared by processes; {', '.join(_SHARED)} are")
        if chosen is not None and rest[:1] == ["bench"]:
            raise ValueError("--precision: bench has --formats, and computes each in a precision of its own")
        with precision.using(chosen):
            tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="jaxinterp",
                description=f"{_DESCRIPTION}\n\n{launch.HELP}",
                args=rest,
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
                sort_subcommands=False,
            )

    return guarded(run, args)


def _taken(option: str, args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of an option of every command, in `--option value` or `--option=value`, and the other arguments."""
    value, rest, waiting = None, [], False
    for argument in args:
        if waiting:
            value, waiting = argument, False
        elif argument == option:
            waiting = True
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    if waiting:
        raise ValueError(f"{option}: expected a value behind it")
    return value, rest


def guarded(job: Callable[[list[str]], object], args: list[str] | None = None) -> int:
    """Runs a command line's job; bad input, a full disk and an interruption end in a message, not in a traceback.

    With `--distributed` among the words it is the part of one of several processes, see `jaxinterp.launch`.

    Args:
        job: takes the words of the command line, without those of `--distributed`.
        args: the words; None means this process's own.

    Returns:
        The exit status: 0, 2 or 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a character of a picture's name
            stream.reconfigure(errors="backslashreplace")
    try:
        distributed, words = launch.options(sys.argv[1:] if args is None else args)
        command = [sys.executable, *(sys.orig_argv[1:] if args is None else ["-m", "jaxinterp", *args])]
        if distributed is not None and not launch.is_worker():
            return launch.supervise(command)
        _keep_compiled_programs()
        if distributed is not None:
            launch.work(distributed, command)
        job(words)
        if distributed is not None:
            processes.current().end()
    except KeyboardInterrupt:
        print("\njaxinterp: stopped; the same command continues from the last finished part", file=sys.stderr)
        return _left(130, "stopped")
    except (ValueError, TypeError, OSError, MemoryError) as error:
        processes.current().yield_to_cause(error)
        print(f"jaxinterp: error: {_reason(error)}{_kept(error)}", file=sys.stderr)
        return _left(2, _reason(error))
    except RuntimeError as error:  # what XLA says when a device's memory gives out
        if "RESOURCE_EXHAUSTED" not in str(error):
            processes.current().break_off(error)
            raise
        print(f"jaxinterp: error: {_reason(MemoryError())}", file=sys.stderr)
        return _left(2, _reason(MemoryError()))
    except BaseException as error:
        processes.current().break_off(error)
        raise
    return 0


def _left(status: int, reason: str) -> int:
    """The exit status; of several processes this one and the others end here."""
    processes.current().fail(status, reason)
    return status


_SHARED = ("explain", "attack", "dissect", "train")
_DESCRIPTION = """What adversarial perturbations do to a network: which cells of a perturbation suppress the true \
class, which promote the target, and where they lie on the class activation maps.

Every command takes --precision default, high or highest: of matrix products and convolutions in float32 (JAX's \
jax_default_matmul_precision; TF32 or bfloat16 by default where the device has them, float32 at the highest).

Compiled programs are kept in ~/.cache/jaxinterp (or $XDG_CACHE_HOME/jaxinterp), so that the second run of a command \
compiles nothing. JAX_COMPILATION_CACHE_DIR moves them, JAX_ENABLE_COMPILATION_CACHE=0 switches that off."""


def _keep_compiled_programs() -> None:
    """Every compiled program is kept between processes, in the user's cache, for this kind of processor only.

    JAX's own settings, where they are given, come first.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        processor = platform.machine() + platform.processor()
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            processor += next((line for line in file if line.startswith(("flags", "Features"))), "")
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        kind = hashlib.sha256(processor.encode()).hexdigest()[:12]
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxinterp" / f"xla-{kind}"))
    # JAX keeps what took a second to compile; a command has hundreds of programs that take less.
    for name, least in (("min_compile_time_secs", 0), ("min_entry_size_bytes", -1)):
        if f"JAX_PERSISTENT_CACHE_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_persistent_cache_{name}", least)


# What befalls a disk while results are written to it.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def _kept(error: BaseException) -> str:
    on_disk = isinstance(error, OSError) and error.strerror and error.errno in _DISK
    return "; what was finished is kept, and the same command continues from there" if on_disk else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    if isinstance(error, MemoryError):
        return "out of memory; a smaller batch (--batch-size, --batch) needs less"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
