"""Train the bundled checkpoints: `python -m dittune.samples.shapes.train STAGE --steps N`.

Stages: `autoencoder`, which all image families share (without it, that of `shapes-sd3` is used),
then a family: `sd3`, `flux` or `sd`. For video `video_autoencoder`, then `wan`, and, before or
after it, `video_decoder`, which trains the decoder alone on. `... train export FAMILY` writes the
pipeline folder. Under `torchrun --nproc-per-node N -m` in place of `python -m`, processes share
each batch.

Every training stage is resumable: kill it at any time, run the same command again, and it goes on
from the last saved state in `--work`. The learning rate is constant, then falls linearly to zero
over the last 30 % of `--steps`, so a run can be lengthened or cut short by another `--steps`.

`--marked 0.67` gives two thirds of the objects a mark that no caption names (`marks.py`);
`--missing 0.5` leaves each named object but one out of its picture with probability one half;
`--twins 0.5` gives half of the objects a second one of the same kind and mark, if there is room;
`--stills 0.5` shows a video family nothing but first frames in the first half of the steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dittune.samples.shapes import train_autoencoder, train_denoiser, train_video_autoencoder
from dittune.samples.shapes.export import export


def main() -> None:
    families = [*train_denoiser.FAMILIES]
    autoencoders = {
        "autoencoder": train_autoencoder.train,
        "video_autoencoder": train_video_autoencoder.train,
        "video_decoder": train_video_autoencoder.train_decoder,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*autoencoders, *families, "export"])
    parser.add_argument("family", nargs="?", choices=families, help="what to export")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of states and logs")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64, help="samples per step of a family")
    parser.add_argument("--init", type=Path, help="start from this pipeline folder")
    parser.add_argument("--marked", type=float, default=0.0, help="share of objects with a mark")
    parser.add_argument("--missing", type=float, default=0.0, help="share of objects left out")
    parser.add_argument("--twins", type=float, default=0.0, help="share of objects with a twin")
    parser.add_argument("--stills", type=float, default=0.0, help="share of steps on first frames")
    parser.add_argument("--scenes", type=int, help="how many training scenes or clips")
    parser.add_argument("--eager", action="store_true", help="train a family without torch.compile")
    parser.add_argument("--out", type=Path, help="default: samples/checkpoints/shapes-FAMILY")
    args = parser.parse_args()
    if (args.stage == "export") != (args.family is not None):
        parser.error("`export FAMILY` needs a family, and no other stage takes one")
    shares = ("marked", "missing", "twins", "stills")
    for name in shares:
        if not 0.0 <= getattr(args, name) <= 1.0:
            parser.error(f"--{name} is a share in [0, 1]")
    if args.stage in ("video_autoencoder", "video_decoder") and (args.init or args.marked):
        parser.error(f"{args.stage} takes no --init and no --marked")
    if args.stage in autoencoders:
        options = {"init": args.init, "marked": args.marked} if args.stage == "autoencoder" else {}
        autoencoders[args.stage](args.work / args.stage, args.steps, **options)
    elif args.stage == "export":
        out = args.out or Path(f"samples/checkpoints/shapes-{args.family}")
        export(args.family, args.work, out)
    else:
        settings = {"init": args.init, "batch": args.batch, "compiled": not args.eager}
        settings |= {name: getattr(args, name) for name in ("scenes", *shares)}
        train_denoiser.train(args.stage, args.work, args.steps, **settings)


if __name__ == "__main__":
    main()
