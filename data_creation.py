"""Write an imbalanced copy of an image data set that holds one folder per class.

    python data_creation.py SRC OUT

Classes are ranked by their number of images, largest first. With M images in the largest, the class
ranked i (from 0) keeps at most M - 2 * i of them and loses the rest at random: 10, 9, 9, 3 becomes
10, 8, 6, 3. `--order random` ranks them by chance. SRC is only read. OUT appears whole or not at
all: it is built in a folder `.data_creation-*` beside it, which stays only after a `kill -9`.

Exit status: 0 done, 2 bad input (one line on stderr says where and what to do), 130 interrupted,
143 terminated, 129 the terminal was closed.
"""

import argparse
import contextlib
import csv
import html
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

__version__ = "1.0"

# The files that `torchvision.datasets.ImageFolder` reads (torchvision.datasets.folder).
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# A batch system ends a program by the first, a terminal that is closed by the second.
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Names of the folders that hold the parts of a data set, and the order in which they are used.
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
FOLDS = {"fold", "split", "part"}
ORDERS = {"size": "ranked by number of images, largest first", "random": "ranked at random"}
CHART = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 480" width="100%"><style>
svg { max-width: 1000px; background: #ffffff; fill: #1f2328; font-family: sans-serif }
text { font-size: 18px } tspan { font-size: 26px } .line { opacity: 0.15 }
.before { fill: #c3c9d1 } .after { fill: #2f6fb0 }
@media (prefers-color-scheme: dark) { svg { background: #0d1117; fill: #f0f6fc }
.before { fill: #656d77 } .after { fill: #58a6ff } }</style>"""
Classes = dict[str, list[str]]  # the sorted image paths of each class, relative to its folder
SAME_NAME = "another name differs only in case; the disk of OUT cannot hold both"
EXAMPLES = """examples:
  python data_creation.py Images dogs
  python data_creation.py Images dogs --step 1 --link --chart staircase.svg
  python data_creation.py Images dogs --order random --dry-run --manifest images.csv"""


class DataError(Exception):
    """Bad input: `main` prints where, what is wrong and what to do, in one line."""


class RankedClass(NamedTuple):
    """A class at its rank; the paths of its images have `/` and are relative to its folder."""

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
    """Return the settings on the command line, checked."""
    about = "write an imbalanced copy of an image data set with one folder per class"
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("data_creation.py", None, about, EXAMPLES, formatter_class=raw)
    add = parser.add_argument
    add("--version", action="version", version=f"%(prog)s {__version__}")
    add("src", metavar="SRC", type=Path, help="folder of class folders; it is only read")
    add("out", metavar="OUT", type=Path, help="folder to write; it must be new or empty")
    shown = " (default: %(default)s)"
    add("--step", metavar="N", type=whole_number, default=2, help="N fewer images per rank" + shown)
    add("--order", choices=ORDERS, default="size", help="rank by size or at random" + shown)
    add("--seed", metavar="N", type=int, default=0, help="seed of all that is random" + shown)
    add("--link", action="store_true", help="hard-link the images where possible, else copy")
    add("--dry-run", action="store_true", help="print the report, do not write OUT")
    add("--manifest", metavar="CSV", type=Path, help="list every image of SRC in this file")
    add("--chart", metavar="SVG", type=svg_file, help="draw the staircase in this file")
    return parser.parse_args(argv)


def whole_number(text: str) -> int:
    """Return `text` as an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def svg_file(text: str) -> Path:
    """Return `text` as the path of an SVG file."""
    if not text.lower().endswith(".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .svg")
    return Path(text)


def printable(text: str) -> str:
    """Return `text` on one line, with control characters and undecodable bytes as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class Scan(NamedTuple):
    """The classes and files that were found in SRC."""

    classes: Classes
    left_out: list[str]  # other files and hidden entries
    folders: set[tuple[int, int]]  # device and inode of every folder looked into


def scan_classes(src: Path) -> Scan:
    """List the classes and images of SRC; `DataError` for links that lead nowhere or back."""
    if not src.is_dir():
        raise DataError(f"{src}: this is no folder; pass the one that holds the class folders")
    visible = (entry for entry in src.iterdir() if not entry.name.startswith("."))
    scan = Scan({entry.name: [] for entry in visible if entry.is_dir()}, [], set())
    for path, is_image in walk_files(str(src), (), scan.folders):
        relative = path.removeprefix(str(src)).replace(os.sep, "/").lstrip("/")
        name, _, image = relative.partition("/")
        if is_image and image:
            scan.classes[name].append(image)
        else:
            scan.left_out.append(relative)
    for images in scan.classes.values():
        images.sort()  # directory order differs between machines: sort before anything random
    return scan


def walk_files(
    folder: str,
    above: tuple[tuple[int, int], ...] = (),
    folders: set[tuple[int, int]] | None = None,
) -> Iterator[tuple[str, bool]]:
    """Yield every file or hidden entry below `folder`, and whether it is an image; follow links.

    The identities of the folders that it looks into are added to `folders`.
    """
    here = identity(folder)
    if here in above:
        raise DataError(f"{folder}: this link leads back to a folder above it; remove it")
    if folders is not None:
        folders.add(here)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                yield entry.path, False
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(f"{entry.path}: this link leads nowhere; repair or remove it")
            elif entry.is_dir():
                yield from walk_files(entry.path, (*above, here), folders)
            else:
                is_image = entry.name.lower().endswith(IMAGE_EXTENSIONS)
                if is_image and not entry.is_file():
                    raise DataError(
                        f"{entry.path}: it has an image's name, but is no file; remove it"
                    )
                yield entry.path, is_image


def identity(path: str | Path) -> tuple[int, int]:
    """Return device and inode of a file or folder: the same by any link and case of its name."""
    info = os.stat(path)
    return info.st_dev, info.st_ino or hash(os.path.realpath(path))  # some drives number nothing


def find_parts(tree: Mapping[str, set[str]]) -> list[str]:
    """Return the folders that are parts of a data set, train, val, test; [] for classes.

    `tree` has for each folder the sub-folders that its images lie in, "" for the folder itself.
    Parts are a folder named for training, all its images in sub-folders, and those named for
    validation or testing; or all folders, if each is named a fold and has sub-folders alone.
    """
    words = {name: re.findall("[a-z]+", name.lower()) for name in sorted(tree)}
    places = {name: PARTS[word] for name in words for word in words[name] if word in PARTS}
    nested = {name for name in tree if "" not in tree[name]}
    if any(places.values()) and 0 in [places[name] for name in places.keys() & nested]:
        return sorted(places, key=lambda name: places[name])
    folds = all(FOLDS.intersection(words[name]) for name in tree)
    return sorted(tree) if folds and nested == tree.keys() else []


def check_classes(src: Path, classes: Classes) -> None:
    """Raise `DataError` unless every folder in SRC is a class with images, at the right depth."""
    filled = [name for name, images in classes.items() if images]
    if not filled:
        raise DataError(f"{src}: no folder in it has images; pass the one that holds the classes")
    folders = {os.path.dirname(path) for path in classes[filled[0]]}
    if len(filled) == 1 and "" not in folders:
        # The folders with the images are the classes; what their paths share is above them.
        shared = os.path.commonpath([os.path.commonpath(folders), *map(os.path.dirname, folders)])
        raise DataError(f"{src}: the classes lie deeper; pass {src / filled[0] / shared} instead")
    places = {name: map(os.path.dirname, classes[name]) for name in filled}
    tree = {name: {place.partition("/")[0] for place in places[name]} for name in filled}
    if parts := find_parts(tree):
        raise DataError(
            f"{src}: {' and '.join(parts[:2])} look like parts of a data set; run data_creation.py "
            f"{src / parts[0]} OUT, or, if they are classes, take their images out of sub-folders"
        )
    for name in sorted(classes.keys() - set(filled)):
        raise DataError(f"{src / name}: this class has no images; remove the folder or fill it")


def check_places(src: Path, scan: Scan, out: Path, files: list[Path]) -> None:
    """Raise `DataError` unless OUT and the further `files` can be written without harm to SRC."""
    for path in (out, *files):
        places = [place for place in (path, *path.parents) if place.exists()]
        if any(identity(place) in scan.folders for place in places):
            raise DataError(f"{path}: this is SRC or inside it, which is only read; name another")
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise DataError(f"{out}: it exists and is not an empty folder; name another OUT")
    if out.exists() and os.path.exists(".") and os.path.samefile(out, "."):
        raise DataError(f"{out}: this is the current folder, which is in use; name another OUT")
    if os.path.ismount(out):  # `Path.is_mount` is not there on Windows, before Python 3.12
        raise DataError(f"{out}: this is a mount point and cannot be replaced; name a folder in it")
    for path in files:
        usable = path.parent.is_dir() and (path.is_file() or not path.exists())
        apart = not path.is_relative_to(out) and not out.is_relative_to(path)
        if not (usable and apart) or files.count(path) > 1:
            raise DataError(
                f"{path}: it must be a file in a folder that exists, outside OUT; name another"
            )


def staircase(largest: int, classes: int, step: int) -> list[int]:
    """Return the cap of each rank: the size of the largest class less `step` a rank."""
    if largest - step * (classes - 1) < 1:
        raise DataError(
            f"--step {step}: the cap falls below 1 image at rank {(largest - 1) // step + 1} of 0 "
            f"to {classes - 1}; the largest step that fits is {(largest - 1) // (classes - 1)}"
        )
    return [largest - step * rank for rank in range(classes)]


def choose_images(images: list[str], cap: int, name: str, seed: int) -> list[str]:
    """At most `cap` of the sorted `images` of the class `name`, drawn at random, sorted.

    Each class has its own random stream, so that other classes change nothing, and a lower cap
    keeps some of what a higher one keeps. `random()` gives the same numbers in every Python.
    """
    stream = random.Random(f"{seed}/{name}".encode(errors="surrogateescape"))
    return sorted(sorted(images, key=lambda _: stream.random())[:cap])


def rank_classes(classes: Classes, order: str, step: int, seed: int) -> list[RankedClass]:
    """Rank the classes, largest first, ties by name, or at random; with the images each keeps."""
    chance = random.Random(f"{seed}//order")  # no class has this stream: names hold no slash
    keys = {"size": lambda name: -len(classes[name]), "random": lambda _: chance.random()}
    names = sorted(sorted(classes), key=keys[order])
    caps = staircase(max(map(len, classes.values())), len(names), step)
    return [
        RankedClass(name, classes[name], cap, choose_images(classes[name], cap, name, seed))
        for name, cap in zip(names, caps, strict=True)
    ]


def format_report(ranked: list[RankedClass], order: str, left_out: int) -> str:
    """Format the table of ranks and the closing lines."""
    width = max(5, *(len(printable(name)) for name, *_ in ranked))
    lines = [f"rank  {'class':{width}}  images    cap   kept  removed"]
    for rank, (name, images, cap, kept) in enumerate(ranked):
        numbers = f"{len(images):6}  {cap:5}  {len(kept):5}  {len(images) - len(kept):7}"
        lines.append(f"{rank:4}  {printable(name):{width}}  {numbers}")
    lines.append(ORDERS[order])
    before = sum(len(images) for _, images, _, _ in ranked)
    sizes = [len(kept) for *_, kept in ranked]
    lines.append(
        f"kept {sum(sizes)} of {before} images in {len(sizes)} classes: largest {max(sizes)}, "
        f"smallest {min(sizes)}, imbalance ratio {max(sizes) / min(sizes):.1f}; "
        f"left out {left_out} other files or hidden entries"
    )
    return "\n".join(lines)


def list_manifest(ranked: list[RankedClass]) -> list[dict[str, Any]]:
    """Return a row for every image of SRC; `kept` is 0 or 1."""
    rows = []
    for rank, (name, images, _, kept) in enumerate(ranked):
        chosen = set(kept)
        for path in images:
            row = {"path": f"{name}/{path}", "class": name, "rank": rank}
            rows.append(row | {"kept": int(path in chosen)})
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Format rows with the same columns as CSV; fractions with eight digits, names unaltered."""
    lines: list[str] = []
    writer = csv.DictWriter(SimpleNamespace(write=lines.append), rows[0].keys())
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{x:.8g}" if isinstance(x, float) else x for k, x in row.items()})
    # With its own line ends the writer quotes a lone carriage return, which "\n" would leave bare.
    text = "".join(line.removesuffix("\r\n") + "\n" for line in lines)
    return text.encode(errors="surrogateescape")


def draw_staircase(ranked: list[RankedClass], order: str) -> str:
    """Draw the images of each class by rank, before and after, for light and dark: SVG."""
    before = [len(images) for _, images, _, _ in ranked]
    after = [len(kept) for *_, kept in ranked]
    names = [html.escape(printable(name)) for name, *_ in ranked]
    slot = 900 / len(ranked)  # width of a class
    image = 330 / max(before)  # height of an image
    # Bars are drawn in units of a class and an image. Narrow ones overlap, to hide their seams.
    transform = f"translate(70 420) scale({slot} {-image})"
    width = 0.8 if slot > 4 else 1 + 0.5 / slot
    lines = [CHART, '<text x="70" y="34" font-weight="bold">Images per class</text>']
    for tick in ticks(max(before)):
        y = 420 - tick * image
        lines.append(f'<rect class="line" x="70" y="{y:.2f}" width="900" height="1"/>')
        lines.append(f'<text x="60" y="{y + 6:.2f}" text-anchor="end">{tick}</text>')
    for x, kind, sizes in ((70, "before", before), (520, "after", after)):
        words = f"{kind}: {sum(sizes):,} images, {min(sizes)} to {max(sizes)} a class"
        lines.append(f'<text x="{x}" y="64"><tspan class="{kind}">\u25a0</tspan> {words}</text>')
        lines.append(f'<g class="{kind}" transform="{transform}">')
        for rank, (name, size) in enumerate(zip(names, sizes, strict=True)):
            bar = f'<rect x="{rank}" width="{width}" height="{size}">'
            lines.append(f"{bar}<title>{name}: {size} {kind}</title></rect>")
        lines.append("</g>")
    for tick in ticks(len(ranked) - 1):
        middle = 70 + slot * (tick + 0.4)
        lines.append(f'<text x="{middle:.2f}" y="442" text-anchor="middle">{tick}</text>')
    lines.append(f'<text x="520" y="470" text-anchor="middle">class, {ORDERS[order]}</text>')
    return "\n".join([*lines, "</svg>\n"])


def ticks(top: int) -> range:
    """At most eight round numbers from 0 to `top`, 1, 2 or 5 times a power of ten apart."""
    steps = (digit * 10**power for power in range(18) for digit in (1, 2, 5))
    return range(0, top + 1, next(step for step in steps if top <= 7 * step))


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write or replace a file as a whole: who reads it sees the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.partial")  # on the same file system
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        unfinished.unlink(missing_ok=True)


def new_sibling(path: Path) -> Path:
    """Return a new hidden path beside `path` or its first missing parent, on its file system."""
    folder = next(parent for parent in path.parents if parent.exists())
    return folder / f".data_creation-{random.getrandbits(64):016x}"


def write_out(src: Path, out: Path, ranked: list[RankedClass], link: bool) -> None:
    """Make OUT with the kept images, as a whole or not at all, flushed to disk."""
    building = new_sibling(out)
    kept = [os.path.join(name, path) for name, _, _, paths in ranked for path in paths]
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
        before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, *STOPS)}
        shutil.rmtree(building, ignore_errors=True)  # which a second signal would leave half done
        for each, handler in before.items():
            signal.signal(each, handler)
        raise


def place_files(src: Path, folder: Path, paths: list[str], link: bool) -> None:
    """Copy or hard-link every path of `src` into `folder`, with a progress bar in a terminal."""
    from tqdm import tqdm

    for parent in {os.path.dirname(path) for path in paths}:
        os.makedirs(os.path.join(folder, parent), exist_ok=True)
    for path in tqdm(paths, "linking" if link else "copying", unit=" images", disable=None):
        source = os.path.join(src, path)
        target = os.path.join(folder, path)
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
    # With links resolved, so that "inside" and "beside" are true of the disk.
    src = Path(os.path.realpath(args.src))
    out = Path(os.path.realpath(args.out))
    manifest = args.manifest and Path(os.path.realpath(args.manifest))
    chart = args.chart and Path(os.path.realpath(args.chart))
    try:
        scan = scan_classes(src)
        check_classes(src, scan.classes)
        check_places(src, scan, out, [path for path in (manifest, chart) if path])
        ranked = rank_classes(scan.classes, args.order, args.step, args.seed)
        print(format_report(ranked, args.order, len(scan.left_out)), flush=True)
        if manifest:
            write_file(manifest, format_table(list_manifest(ranked)))
        if chart:
            write_file(chart, draw_staircase(ranked, args.order).encode())
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
    for each in STOPS:
        if signal.getsignal(each) is signal.SIG_DFL:  # `nohup` has SIGHUP ignored
            signal.signal(each, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
