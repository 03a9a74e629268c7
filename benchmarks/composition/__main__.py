"""`python -m benchmarks.composition`: the command without typer and rich; see bench.py."""

import argparse
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.composition.bench import bench
from merging import LoramixError


def main() -> None:
    """Run the study; an error that loramix raises on purpose is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.composition", description="What composing skills is worth.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the public data")
    parser.add_argument("--model", type=Path, metavar="DIR", help="base model; made by examples/model.py if not given")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "loramix-composition", metavar="DIR")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, help="begin nothing after so many; the same command goes on")
    parser.add_argument("--quick", action="store_true", help="much less of everything, to see that it runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where composition.json goes")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="where the plots go")
    given = vars(parser.parse_args())
    command = "python -m benchmarks.composition " + shlex.join(sys.argv[1:])
    try:
        bench(**given | {"device": torch.device(given["device"])}, command=command, say=partial(print, flush=True))
    except LoramixError as error:
        print(f"loramix: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
