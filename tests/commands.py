"""Commands in one program, for tests of several processes: python commands.py FOLDER OUT COMMAND... [--distributed ...]

FOLDER holds what `test_distributed.py` makes: checkpoints, pictures and a set in Broden's format. The variable CRASH
says what befalls the process that would write a part: `attack/ifgsm:kill`, or `:full` where the disk is full.
"""

import errno
import os
import signal
import sys
from pathlib import Path

from jaxinterp import cli
from jaxinterp.runs import Run


def main(words: list[str]) -> None:
    """Runs the commands on little of everything."""
    folder, out = Path(words[0]), Path(words[1])
    os.environ["JAXINTERP_CKPTS"] = str(folder / "ckpts")
    crash()
    attacked = {"model": "small_cnn", "attack": ("ifgsm:steps=3,eps=0.5",), "batch_size": 2}
    if "explain" in words:
        cli.explain((str(folder / "pictures"),), cell=16, out=out / "explain", **attacked)
    if "attack" in words:
        cli.attack((str(folder / "pictures"),), out=out / "attack", **attacked)
    if "train" in words:
        train(folder, out)
    if "dissect" in words:
        cli.dissect(
            data=f"broden:{folder / 'broden'}",
            model="small_cnn",
            node=("conv2",),
            out=out / "dissect",
            quantile=0.1,
            minimum=0.02,
            top=2,
            batch_size=8,
            form="gated",
        )


def train(folder: Path, out: Path) -> None:
    """Two epochs of two batches; one picture is damaged."""
    faces = (str(folder / "faces"),)
    given = {"model": "small_cnn", "method": "standard", "epochs": 2, "batch_size": 8}
    cli.train(data=faces, held_out=faces, out=out / "train", **given)


def crash() -> None:
    """Lets the process end when it would write the part that CRASH names."""
    name, _, kind = os.environ.get("CRASH", "").partition(":")
    write = Run.write_part

    def instead(run: Run, part: str, arrays) -> None:
        if name and f"{run.directory.name}/{part}".startswith(name):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.directory))
        write(run, part, arrays)

    Run.write_part = instead  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
