"""How long `import jaxinterp` takes beyond `import jax`, and how long `jaxinterp --help` takes.

    python experiments/bench_import.py --out results/bench.jsonl

Every figure is the median over fresh processes, which take turns; the file cache is warm after the first round, which
is not counted.

Expected time: 1 minute. Expected result: below 1.0 s for the import, below 2 s for --help.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tyro

from jaxinterp.bench.records import append
from jaxinterp.bench.timing import interleaved, middle, shown, verdict

_IMPORT = """
import time
import jax
start = time.perf_counter()
import jaxinterp
print(time.perf_counter() - start)
"""


def main(rounds: int = 9, out: Path | None = None) -> None:
    """Times the import and the help.

    Args:
        rounds: How often everything is timed.
        out: File to which one JSON line is appended.
    """
    script = Path(sys.executable).with_name("jaxinterp")
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "jaxinterp"]
    inside: list[float] = []

    def beyond() -> None:
        done = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True)
        inside.append(float(done.stdout))

    def run(*args: str) -> None:
        subprocess.run(args, check=True, capture_output=True)

    times = interleaved(
        {
            "import": beyond,
            "import jax, whole process": lambda: run(sys.executable, "-c", "import jax"),
            "jaxinterp --help": lambda: run(*command, "--help"),
        },
        rounds + 1,
    )
    times = {name: values[1:] for name, values in times.items() if name != "import"}
    times = {"import jaxinterp beyond import jax": inside[1:], **times}
    targets = {"import jaxinterp beyond import jax": 1.0, "jaxinterp --help": 2.0}
    for name, values in times.items():
        target = verdict(middle(values)["median"], targets[name]) if name in targets else ""
        print(f"{name:36}{shown(values, digits=2):>22} s  {target}")
    append(out, "import", {"rounds": rounds, "seconds": {name: middle(values) for name, values in times.items()}})


if __name__ == "__main__":
    tyro.cli(main)
