"""Fetch PASCAL VOC 2007 and 2012 from their home or a mirror, verify and extract them.

    python scripts/download_voc.py --root DATA

gives DATA/VOCdevkit/VOC2007 (trainval and test) and DATA/VOCdevkit/VOC2012 (trainval; its test
annotations are not public), a download of 0.9 and 2.0 GB. Stop it at any time: the same command
goes on.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rpn_train.download import Archive, install
from rpn_train.errors import DataError

HOME = "http://host.robots.ox.ac.uk/pascal/VOC"

# VOC publishes neither sizes nor checksums. Sizes and SHA-256 are those that TensorFlow Datasets
# recorded (url_checksums/voc.txt); torchvision's prototype data sets state the same SHA-256
# (prototype/datasets/_builtin/voc.py).
ARCHIVES = {
    2007: (
        Archive(
            "voc2007/VOCtrainval_06-Nov-2007.tar",
            size=460_032_000,
            sha256="7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
            folder="VOCdevkit/VOC2007",
        ),
        Archive(
            "voc2007/VOCtest_06-Nov-2007.tar",
            size=451_020_800,
            sha256="6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
            folder="VOCdevkit/VOC2007",
        ),
    ),
    2012: (
        Archive(
            "voc2012/VOCtrainval_11-May-2012.tar",
            size=1_999_639_040,
            sha256="e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
            folder="VOCdevkit/VOC2012",
        ),
    ),
}


def main(
    argv: Sequence[str] | None = None, archives: Mapping[int, Sequence[Archive]] = ARCHIVES
) -> int:
    """Return the exit code: 0 done, 2 an error in one line on stderr, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Fetch, verify and extract PASCAL VOC.")
    parser.add_argument("--root", type=Path, required=True, help="where VOCdevkit goes")
    parser.add_argument(
        "--years",
        type=int,
        nargs="+",
        choices=ARCHIVES,
        default=list(ARCHIVES),
        help="default: both",
    )
    parser.add_argument("--base-url", default=HOME, help=f"a mirror of {HOME}")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the tar files")
    args = parser.parse_args(argv)
    folders = []
    try:
        for year in args.years:
            for archive in archives[year]:
                folder = install(
                    archive, args.root, base_url=args.base_url, keep_archive=args.keep_archives
                )
            folders.append(folder)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:  # OSError: a full disk, a folder that is not writable
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        print(f"rpn-train dataset=voc {shlex.quote(f'dataset.root={folder}')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
