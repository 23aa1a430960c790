"""Three commands in one program, for tests of several processes: python commands.py FOLDER OUT [--distributed ...].

FOLDER holds what `test_distributed.py` makes: checkpoints, pictures and a set in Broden's format. The variable CRASH
names a file of the results and, after a colon, what befalls the process that has written it: `kill`, or `full`, where
the disk is full from then on.
"""

import errno
import os
import signal
import sys
from pathlib import Path

from jaxinterp import cli
from jaxinterp.runs import Run


def main(words: list[str]) -> None:
    """Explains, attacks and dissects."""
    folder, out = map(Path, words)
    os.environ["JAXINTERP_CKPTS"] = str(folder / "ckpts")
    crash()
    cli.explain(
        str(folder / "pictures"),
        model="small_cnn",
        attack=("ifgsm:steps=2,eps=0.1",),
        cell=16,
        out=out / "explain",
        batch_size=2,
    )
    cli.attack(
        str(folder / "pictures"), model="small_cnn", attack=("pgd:steps=3,eps=0.1",), out=out / "attack", batch_size=2
    )
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


def crash() -> None:
    """Lets the process end when it has written the file that CRASH names."""
    name, _, kind = os.environ.get("CRASH", ":").partition(":")
    write = Run.write_part

    def then(run: Run, part: str, arrays) -> None:
        write(run, part, arrays)
        if name and part.startswith(name):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.directory))

    Run.write_part = then  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
