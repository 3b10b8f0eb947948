"""Train the bundled checkpoints: `python -m dittune.samples.shapes.train STAGE --steps N`.

Stages, in this order: `autoencoder`, `sd3`, and `export-sd3`, which writes the pipeline folder.
Every training stage is resumable: kill it at any time, run the same command again, and it goes on
from the last saved state in `--work`. The learning rate is constant, then falls linearly to zero
over the last 30 % of `--steps`, so a run can be lengthened or cut short by another `--steps`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dittune.samples.shapes import train_autoencoder, train_sd3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["autoencoder", "sd3", "export-sd3"])
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of states and logs")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--init", type=Path, help="start `sd3` from the weights of this pipeline")
    parser.add_argument("--out", type=Path, default=Path("samples/checkpoints/shapes-sd3"))
    args = parser.parse_args()
    if args.stage == "autoencoder":
        train_autoencoder.train(args.work / "autoencoder", args.steps)
    elif args.stage == "sd3":
        train_sd3.train(args.work, args.steps, args.init)
    else:
        train_sd3.export(args.work, args.out)


if __name__ == "__main__":
    main()
