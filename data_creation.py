"""Write an imbalanced copy of an image data set that holds one folder per class.

    python data_creation.py SRC OUT

Classes are ranked by their number of images, largest first. With M images in the largest, the class
ranked i (from 0) keeps at most M - 2 * i of them and loses the rest at random: 252, 247, 246, 245,
244, 243, 242 becomes 252, 247, 246, 245, 244, 242, 240. SRC is only read. OUT appears whole or not
at all: it is built in a folder `.data_creation-*` beside its place, which only a killed run leaves.

Exit status: 0 done, 2 bad input (one line on stderr says where and what to do), 130 interrupted.
"""

import argparse
import contextlib
import csv
import io
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, NoReturn

# What `torchvision.datasets.ImageFolder` counts (torchvision.datasets.folder.IMG_EXTENSIONS).
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

SAME_NAME = "another name differs only in case; the disk of OUT cannot hold both"
EXAMPLES = """examples:
  python data_creation.py Images dogs
  python data_creation.py Images dogs --step 1 --link --plot staircase.png
  python data_creation.py Images dogs --dry-run --manifest images.csv"""


class DataError(Exception):
    """Bad input, told in one line: where, what, what to do."""


class RankedClass(NamedTuple):
    """A class in its place on the staircase; paths are `/`-separated and relative to its folder."""

    name: str
    images: list[str]
    cap: int
    kept: list[str]


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)}; see --help\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The settings on the command line, checked."""
    parser = OneLineParser(
        prog="data_creation.py",
        description="write an imbalanced copy of an image data set with one folder per class",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("src", metavar="SRC", type=Path, help="folder of class folders; it is only read")
    add("out", metavar="OUT", type=Path, help="folder to write; it must be new or empty")
    step_help = "lower the cap by N images per rank (default: %(default)s)"
    add("--step", metavar="N", type=whole_number, default=2, help=step_help)
    seed_help = "seed of the random choice (default: %(default)s)"
    add("--seed", metavar="N", type=int, default=0, help=seed_help)
    add("--link", action="store_true", help="hard-link the images where possible, else copy")
    add("--dry-run", action="store_true", help="print the report, do not write OUT")
    add("--manifest", metavar="CSV", type=Path, help="list every image of SRC in this file")
    add("--plot", metavar="PNG", type=Path, help="draw the staircase in this file")
    return parser.parse_args(argv)


def whole_number(text: str) -> int:
    """`text` as an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def printable(text: str) -> str:
    """`text` on one line, with control characters and undecodable bytes as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class Scan(NamedTuple):
    """What SRC holds."""

    classes: dict[str, list[str]]  # the sorted image paths of each class
    left_out: int  # other files and hidden entries
    folders: set[tuple[int, int]]  # device and inode of every folder looked into


def scan_classes(src: Path) -> Scan:
    """The classes and images of SRC; raises `DataError` for links that lead nowhere or back."""
    if not src.is_dir():
        raise DataError(f"{src}: not a folder; pass the folder that holds the class folders")
    visible = (entry for entry in src.iterdir() if not entry.name.startswith("."))
    scan = Scan({entry.name: [] for entry in visible if entry.is_dir()}, 0, set())
    left_out = 0
    for path, is_image in walk_files(str(src), (), scan.folders):
        relative = path.removeprefix(str(src)).replace(os.sep, "/").lstrip("/")
        name, _, image = relative.partition("/")
        if is_image and image:
            scan.classes[name].append(image)
        else:
            left_out += 1
    for images in scan.classes.values():
        images.sort()  # directory order differs between machines: sort before anything random
    return scan._replace(left_out=left_out)


def walk_files(folder: str, above: tuple, folders: set) -> Iterator[tuple[str, bool]]:
    """Every file or hidden entry below `folder`, links followed, and whether it is an image."""
    here = identity(folder)
    if here in above:
        raise DataError(f"{folder}: this link leads back to a folder above it; remove it")
    folders.add(here)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                yield entry.path, False
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(f"{entry.path}: this link leads nowhere; mend or remove it")
            elif entry.is_dir():
                yield from walk_files(entry.path, (*above, here), folders)
            else:
                is_image = entry.name.lower().endswith(IMAGE_EXTENSIONS)
                if is_image and not entry.is_file():
                    raise DataError(f"{entry.path}: named like an image, but no file; remove it")
                yield entry.path, is_image


def identity(path: str | Path) -> tuple[int, int]:
    """What tells a folder whatever its name: links lead to it, and file systems ignore case."""
    info = os.stat(path)
    return info.st_dev, info.st_ino


def check_classes(src: Path, classes: dict[str, list[str]]) -> None:
    """Raise `DataError` unless every folder in SRC is a class with images, at the right depth."""
    filled = [name for name, images in classes.items() if images]
    if not filled:
        raise DataError(f"{src}: no images in class folders; pass the folder that holds those")
    folders = {os.path.dirname(path) for path in classes[filled[0]]}
    if len(filled) == 1 and "" not in folders:
        # The folders with the images are the classes; what their paths share is above them.
        shared = os.path.commonpath([os.path.commonpath(folders), *map(os.path.dirname, folders)])
        raise DataError(f"{src}: one level too deep; pass {src / filled[0] / shared} instead")
    for name in sorted(classes.keys() - set(filled)):
        raise DataError(f"{src / name}: a class without images; remove the folder or fill it")


def check_places(src: Path, scan: Scan, out: Path, files: list[Path]) -> None:
    """Raise `DataError` unless OUT and the further `files` can be written without harm to SRC."""
    for path in (out, *files):
        existing = (place for place in (path, *path.parents) if place.exists())
        if any(identity(place) in scan.folders for place in existing):
            raise DataError(f"{path}: this is SRC or inside it, which is only read; name another")
    if out.exists() and identity(out) in map(identity, src.parents):
        raise DataError(f"{out}: SRC is inside this folder; name another OUT")
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise DataError(f"{out}: exists and is not an empty folder; remove it or name another OUT")
    if out.is_mount():
        raise DataError(f"{out}: a mount point, which cannot be replaced; name a folder inside it")
    for path in files:
        usable = path.parent.is_dir() and not path.is_dir() and not path.is_relative_to(out)
        if not usable or files.count(path) > 1:
            raise DataError(f"{path}: not a file of its own in a folder outside OUT; name another")


def staircase(counts: list[int], step: int) -> list[int]:
    """The cap of each rank: the largest count less `step` a rank; `counts` come largest first."""
    largest, last = counts[0], len(counts) - 1
    if largest - step * last < 1:
        raise DataError(
            f"--step {step}: the cap falls below 1 image at rank {(largest - 1) // step + 1} of 0 "
            f"to {last}; the largest step that fits is {(largest - 1) // last}"
        )
    return [largest - step * rank for rank in range(len(counts))]


def choose_images(images: list[str], cap: int, name: str, seed: int) -> list[str]:
    """At most `cap` of the sorted `images` of the class `name`, drawn at random, sorted.

    The class has a random stream of its own, so that it depends on no other, and a lower cap keeps
    a subset. Every Python gives the same stream of `random()`.
    """
    stream = random.Random(f"{seed}/{name}".encode(errors="surrogateescape"))
    shuffled = sorted(images, key=lambda _: stream.random())
    return sorted(shuffled[:cap])


def rank_classes(classes: dict[str, list[str]], step: int, seed: int) -> list[RankedClass]:
    """The classes by falling number of images, ties by name, each with the images it keeps."""
    names = sorted(classes, key=lambda name: (-len(classes[name]), name))
    caps = staircase([len(classes[name]) for name in names], step)
    return [
        RankedClass(name, classes[name], cap, choose_images(classes[name], cap, name, seed))
        for name, cap in zip(names, caps, strict=True)
    ]


def format_report(ranked: list[RankedClass], left_out: int) -> str:
    """The table of ranks and the closing line."""
    width = max(5, *(len(printable(each.name)) for each in ranked))
    lines = [f"rank  {'class':{width}}  images    cap   kept  removed"]
    for rank, (name, images, cap, kept) in enumerate(ranked):
        numbers = f"{len(images):6}  {cap:5}  {len(kept):5}  {len(images) - len(kept):7}"
        lines.append(f"{rank:4}  {printable(name):{width}}  {numbers}")
    before, sizes = sum(len(each.images) for each in ranked), [len(each.kept) for each in ranked]
    lines.append(
        f"kept {sum(sizes)} of {before} images in {len(sizes)} classes: largest {max(sizes)}, "
        f"smallest {min(sizes)}, imbalance ratio {max(sizes) / min(sizes):.1f}; "
        f"left out {left_out} other files or hidden entries"
    )
    return "\n".join(lines)


def format_manifest(ranked: list[RankedClass]) -> bytes:
    """A CSV table with a row for every image of SRC; `kept` is 0 or 1."""
    lines: list[str] = []
    writer = csv.writer(SimpleNamespace(write=lines.append))
    writer.writerow(["path", "class", "rank", "kept"])
    for rank, (name, images, _, kept) in enumerate(ranked):
        chosen = set(kept)
        writer.writerows([f"{name}/{path}", name, rank, int(path in chosen)] for path in images)
    # With its own line ends the writer quotes a lone carriage return, which "\n" would leave bare.
    text = "".join(line.removesuffix("\r\n") + "\n" for line in lines)
    return text.encode(errors="surrogateescape")


def draw_staircase(ranked: list[RankedClass]) -> bytes:
    """A PNG chart of the images of each class by rank, before and after."""
    from PIL import Image, ImageDraw, ImageFont  # loaded only here: the script starts at once

    picture = Image.new("RGB", (1600, 900), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(28)
    largest, gap = len(ranked[0].images), 0.2 if len(ranked) < 200 else 0
    x = [130 + 1430 * rank / len(ranked) for rank in range(len(ranked) + 1)]
    y = [800 - 690 * images / largest for images in range(largest + 1)]
    width = (x[1] - x[0]) * (1 - gap)
    for tick in ticks(largest):
        draw.line([x[0], y[tick], x[-1], y[tick]], "#dddddd", 2)
        draw.text((115, y[tick]), str(tick), "black", font, "rm")
    for rank, each in enumerate(ranked):
        for images, colour in ((each.images, "#c9ced6"), (each.kept, "#2f6fb0")):
            draw.rectangle([x[rank], y[len(images)], x[rank] + width, y[0]], colour)
    for left, colour, label in ((900, "#c9ced6", "in SRC"), (1200, "#2f6fb0", "kept in OUT")):
        draw.rectangle([left, 24, left + 28, 52], colour)
        draw.text((left + 42, 38), label, "black", font, "lm")
    for tick in ticks(len(ranked) - 1):
        draw.text((x[tick] + width / 2, 808), str(tick), "black", font, "mt")
    draw.text((845, 885), "rank of the class, largest first", "black", font, "mb")
    draw.text((20, 38), "images per class", "black", font, "lm")
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def ticks(top: int) -> range:
    """At most eight round numbers from 0 to `top`, 1, 2 or 5 times a power of ten apart."""
    steps = (digit * 10**power for power in range(18) for digit in (1, 2, 5))
    return range(0, top + 1, next(step for step in steps if top <= 7 * step))


def write_file(path: Path, content: bytes) -> None:
    """Write or replace the file as a whole."""
    partial = new_sibling(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def new_sibling(path: Path) -> Path:
    """A fresh hidden path on the file system of `path`: beside it or its first missing parent."""
    folder = next(parent for parent in path.parents if parent.exists())
    return folder / f".data_creation-{random.getrandbits(64):016x}"


def write_out(src: Path, out: Path, ranked: list[RankedClass], link: bool) -> None:
    """Make OUT with the kept images, as a whole or not at all, flushed to disk."""
    building = new_sibling(out)
    kept = [os.path.join(each.name, path) for each in ranked for path in each.kept]
    needed = 0 if link else sum(os.stat(os.path.join(src, path)).st_size for path in kept)
    free = shutil.disk_usage(building.parent).free
    if needed > free:
        sizes = f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free"
        raise DataError(f"{out}: {sizes}; make room, name another OUT, or try --link")
    try:
        building.mkdir()
        for name, *_ in ranked:
            if (building / name).exists():
                raise DataError(f"{src / name}: {SAME_NAME}")
            (building / name).mkdir()
        place_files(src, building, kept, link)
        if hasattr(os, "sync"):  # not on Windows
            os.sync()
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()  # empty, but Windows renames nothing onto it
        building.rename(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def place_files(src: Path, folder: Path, paths: list[str], link: bool) -> None:
    """Copy or hard-link every path of `src` into `folder`, with a progress bar in a terminal."""
    from tqdm import tqdm

    folders = {str(folder)}
    for path in tqdm(paths, "linking" if link else "copying", unit=" images", disable=None):
        source, target = os.path.join(src, path), os.path.join(folder, path)
        if (parent := os.path.dirname(target)) not in folders:
            os.makedirs(parent, exist_ok=True)
            folders.add(parent)
        if link:
            # link() itself would not follow a symbolic link; where it is refused, copy.
            with contextlib.suppress(OSError):
                os.link(os.path.realpath(source) if os.path.islink(source) else source, target)
                continue
        if os.path.lexists(target):
            raise DataError(f"{source}: {SAME_NAME}")
        shutil.copyfile(source, target)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse_args(argv)
    # Free of links, so that "inside" and "beside" mean what they say.
    src, out = Path(os.path.realpath(args.src)), Path(os.path.realpath(args.out))
    manifest, plot = (path and Path(os.path.realpath(path)) for path in (args.manifest, args.plot))
    try:
        scan = scan_classes(src)
        check_classes(src, scan.classes)
        check_places(src, scan, out, [path for path in (manifest, plot) if path])
        ranked = rank_classes(scan.classes, args.step, args.seed)
        print(format_report(ranked, scan.left_out), flush=True)
        if manifest:
            write_file(manifest, format_manifest(ranked))
        if plot:
            write_file(plot, draw_staircase(ranked))
        if not args.dry_run:
            write_out(src, out, ranked, args.link)
            print(f"written to {printable(str(args.out))}")
    except (DataError, OSError) as error:
        print(f"data_creation.py: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndata_creation.py: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a batch system's stop cleans up too
    sys.exit(main())
