"""Fetch COCO 2017 from its home or a mirror, verify it and lay it out for `dataset=coco`.

    python scripts/download_coco.py --root DATA

gives DATA/train2017, DATA/val2017 and DATA/annotations: a download of 20.4 GB, which needs twice
that room while train2017 is being extracted. Stop it at any time: the same command goes on.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rpn_train.download import Archive, install
from rpn_train.errors import DataError

HOME = "http://images.cocodataset.org"

# COCO publishes neither sizes nor checksums. These are the sizes and SHA-256 that TensorFlow
# Datasets recorded from this home (url_checksums/coco.txt); torchvision's prototype data sets
# (prototype/datasets/_builtin/coco.py) state the same SHA-256.
ARCHIVES = {
    "annotations": Archive(
        "annotations/annotations_trainval2017.zip",
        size=252_907_541,
        sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        folder="annotations",
    ),
    "train2017": Archive(
        "zips/train2017.zip",
        size=19_336_861_798,
        sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        folder="train2017",
    ),
    "val2017": Archive(
        "zips/val2017.zip",
        size=815_585_330,
        sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        folder="val2017",
    ),
}
SPLITS = ("train2017", "val2017")


def main(argv: Sequence[str] | None = None, archives: Mapping[str, Archive] = ARCHIVES) -> int:
    """Return the exit code: 0 done, 2 an error in one line on stderr, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Fetch, verify and extract COCO 2017.")
    parser.add_argument("--root", type=Path, required=True, help="where it goes")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="default: both")
    parser.add_argument("--base-url", default=HOME, help=f"a mirror of {HOME}")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the zip files")
    args = parser.parse_args(argv)
    try:
        for key in ("annotations", *args.splits):
            install(
                archives[key], args.root, base_url=args.base_url, keep_archive=args.keep_archives
            )
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:  # OSError: a full disk, a folder that is not writable
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"COCO 2017 ({', '.join(args.splits)}) is in {args.root}")
    if all((args.root / split).is_dir() for split in SPLITS):
        print(f"rpn-train dataset=coco {shlex.quote(f'dataset.root={args.root}')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
