"""data_creation.py: the rule against hand-worked numbers; OUT whole or not at all."""

import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from conftest import Terminal, rows_of

import data_creation
from data_creation import DataError, choose_images

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX links, signals or limits")

# Images of the 120 classes of the official Stanford Dogs, as size or size*classes.
DOGS = """252 239 232 219 218*3 214 213 210 209 206 202*3 200*2 197*2 196*4 195*2 192 188*2 187*2
    186 185*2 184 183 182*3 181 180 179 178 175 172*4 171*2 170 169*4 168 167 164*2 161 160 159*5
    158*2 157*4 156*4 155*6 154*4 153*5 152*8 151*7 150*13 149 148"""


@pytest.fixture(autouse=True)
def inside_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def src(make_folder):
    return make_folder({"cat": 8, "dog": 7, "emu": 7, "fox": 1})  # keeps 8, 6, 4, 1


def classes_of(**counts):
    return {name: [f"{number:03}.jpg" for number in range(n)] for name, n in counts.items()}


def rank(classes, step=2, seed=0, order="size"):
    return data_creation.rank_classes(classes, order, step, seed)


def build(plan):
    """Make every `folder/`, `file` (holding its name), `link->target` and `fifo|` of `plan`."""
    for item in plan.split():
        name, _, target = item.partition("->")
        path = Path(name.rstrip("|"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(Path(target).absolute())
        elif name.endswith("|"):
            os.mkfifo(path)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_text(name)


def tree(root="."):
    """Everything below `root`: bytes and time of change of a file, None for all else."""
    found = {path.relative_to(root).as_posix(): path for path in Path(root).rglob("*")}
    state = {name: path.is_file() and path.stat().st_mtime_ns for name, path in found.items()}
    return {name: (found[name].read_bytes(), at) if at else None for name, at in state.items()}


def files(root):
    return {name: entry[0] for name, entry in tree(root).items() if entry}


def run(line):
    """The exit status of the script for this command line, in this process."""
    try:
        return data_creation.main(line.split())
    except SystemExit as stop:
        return stop.code


def start(line, **options):
    command = [sys.executable, data_creation.__file__, *line.split()]
    return subprocess.Popen(command, stdout=-1, stderr=-1, encoding="utf-8", **options)


def test_a_class_keeps_what_it_has_up_to_the_cap_of_its_rank_and_ties_go_by_name():
    for counts, step, kept in (
        ([252, 247, 246, 245, 244, 243, 242], 2, [252, 247, 246, 245, 244, 242, 240]),
        ([252, 252, 252], 2, [252, 250, 248]),
        ([10, 3, 3, 3], 3, [10, 3, 3, 1]),
        ([4, 4, 2], 0, [4, 4, 2]),
        ([1], 99, [1]),
    ):
        classes = classes_of(**{f"c{rank}": count for rank, count in enumerate(counts)})
        ranked = rank(dict(reversed(classes.items())), step)
        assert [(each.name, len(each.kept)) for each in ranked] == list(
            zip(classes, kept, strict=True)
        )


def test_too_large_a_step_names_the_rank_and_the_largest_step_that_fits():
    for largest, step, at, fits, caps in (
        (10, 4, "3 of 0 to 3", 3, [10, 7, 4, 1]),  # 10, 6, 2, -2
        (3, 1, "3 of 0 to 4", 0, [3, 3, 3, 3, 3]),  # 3, 2, 1, 0
    ):
        with pytest.raises(DataError, match=f"--step {step}: .* at rank {at}; .* fits is {fits}$"):
            data_creation.staircase(largest, len(caps), step)
        with pytest.raises(DataError):
            data_creation.staircase(largest, len(caps), fits + 1)
        assert data_creation.staircase(largest, len(caps), fits) == caps


def test_stanford_dogs_keep_15417_of_20580_images():
    pairs = [item.partition("*") for item in DOGS.split()]
    counts = [int(size) for size, _, times in pairs for _ in range(int(times or 1))]
    assert (len(counts), sum(counts)) == (120, 20580)
    ranked = rank(classes_of(**{f"dog{rank}": count for rank, count in enumerate(counts)}))
    sizes = [len(each.kept) for each in ranked]
    assert (sum(sizes), sizes[0], sizes[-1], max(sizes), min(sizes)) == (15417, 252, 14, 252, 14)


def test_a_random_order_depends_on_seed_and_names_alone_and_falls_from_the_largest_class():
    classes = classes_of(a=10, b=3, c=8, d=9, e=1)
    for seed, names, sizes in ((0, "dbaec", [9, 3, 6, 1, 2]), (1, "dabec", [9, 8, 3, 1, 2])):
        for same in (classes, dict(reversed(classes.items()))):  # caps 10, 8, 6, 4, 2
            kept = {each.name: len(each.kept) for each in rank(same, 2, seed, "random")}
            assert "".join(kept) == names and list(kept.values()) == sizes
    others = rank(classes_of(a=1, b=9, c=9, d=9, e=99), 2, 1, "random")
    assert "".join(each.name for each in others) == "dabec"


def test_the_draw_depends_on_class_and_seed_alone():
    images = classes_of(a=20)["a"]
    for seed, kept in ((0, "2469"), (1, "3567")):
        assert choose_images(images[:10], 4, "cat", seed) == [f"00{digit}.jpg" for digit in kept]
    draws = [set(choose_images(images, cap, "cat", 0)) for cap in range(21)]
    assert all(draws[cap] < draws[cap + 1] for cap in range(20))  # a steeper step keeps a subset
    assert len({tuple(choose_images(images, 10, c, seed)) for c in "ab" for seed in range(9)}) == 18


# Folders of images, and those of them that are parts of a data set, not classes.
LAYOUTS = {
    "strain_a/1 strain_b/1 trainer/1 tester/1": "",
    "train/left car/left bus/right": "",
    "train test car": "",  # toys
    "train/cat test/cat": "train test",
    "Training/cat Testing/cat": "Training Testing",
    "extra/cat train/cat test": "train test",  # without labels
    "Fold1/cat Fold2/cat": "Fold1 Fold2",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_data_set_are_told_from_classes(layout):
    tree = {}
    for folder in layout.split():
        name, _, below = folder.partition("/")
        tree.setdefault(name, set()).add(below)
    assert data_creation.find_parts(tree) == LAYOUTS[layout].split()


def test_out_holds_the_kept_images_under_their_names_and_nothing_else(capsys):
    # Both classes have up/, but images of their own too: they are no parts.
    names = "a/1.jpg a/2.JPEG a/sub.jpg/deep/3.Png a/up/1.bmp b/1.webp b/sub/1.tif b/up/1.ppm"
    build(" ".join(f"src/{name}" for name in names.split()))
    build("src/b/notes.txt src/a/.4.jpg src/.git/5.jpg src/top.jpg src/a/.sub/6.jpg")
    assert run("src out --step 1") == 0
    assert files("out") == {name: f"src/{name}".encode() for name in names.split()}
    assert set(os.listdir("out")) == {"a", "b"} and set(os.listdir()) == {"src", "out"}
    assert "left out 5 other files or hidden entries" in capsys.readouterr().out


def test_out_is_a_copy_in_a_new_or_empty_folder_listed_in_a_manifest_and_src_is_unchanged(
    src, monkeypatch
):
    def list_backwards(folder, scandir=os.scandir):  # as another machine may do
        with scandir(folder) as entries:
            return nullcontext(sorted(entries, key=lambda each: each.name, reverse=True))

    before = tree(src)
    build("empty/ table.csv")  # the table is replaced
    flushed = []
    monkeypatch.setattr(os, "sync", lambda: flushed.append(list(Path("new").rglob("*.jpg"))))
    assert run("src empty") == 0
    monkeypatch.setattr(os, "scandir", list_backwards)
    assert run("src new/parents/out --manifest table.csv") == 0
    assert flushed == [[], []]  # both times before OUT was there
    assert tree(src) == before
    kept = files("empty")
    assert kept == files("new/parents/out") and kept.items() < files(src).items()
    assert Counter(name[:3] for name in kept) == {"cat": 8, "dog": 6, "emu": 4, "fox": 1}
    listed = rows_of(Path("table.csv"))
    assert [*listed[0]] == ["path", "class", "rank", "kept"]
    for row, path in zip(listed, sorted(files("src")), strict=True):
        rank = str("cdef".index(path[0]))
        assert [*row.values()] == [path, path[:3], rank, str(int(path in kept))]


@posix
def test_links_in_src_are_followed_and_copied_as_files_or_linked_where_possible(monkeypatch):
    def refuse_far(source, target, link=os.link):
        if "cat.jpg" in source:
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    build("far/dogs/1.jpg far/cat.jpg src/a/1.jpg src/a/2.jpg->far/cat.jpg")
    build("src/a/sub->far/dogs src/b->far/dogs")
    assert run("src out --step 1") == run("src out1 --step 1 --link") == 0
    monkeypatch.setattr(os, "link", refuse_far)
    assert run("src out2 --step 1 --link") == 0
    dog = b"far/dogs/1.jpg"
    copied = {"a/1.jpg": b"src/a/1.jpg", "a/2.jpg": b"far/cat.jpg", "a/sub/1.jpg": dog}
    for out, linked in (("out", []), ("out1", list(copied)), ("out2", ["a/1.jpg", "a/sub/1.jpg"])):
        assert files(out) == copied | {"b/1.jpg": dog}
        assert not any(path.is_symlink() for path in Path(out).rglob("*"))
        same = [name for name in copied if os.path.samefile(f"src/{name}", f"{out}/{name}")]
        assert same == linked


def test_the_report_has_a_row_for_each_rank_and_a_closing_line(src, capsys):
    before = tree()
    assert run("src out --dry-run") == 0 and tree() == before
    report = capsys.readouterr().out
    assert [" ".join(line.split()) for line in report.splitlines()] == [
        "rank class images cap kept removed",
        "0 cat 8 8 8 0",
        "1 dog 7 6 6 1",
        "2 emu 7 4 4 3",
        "3 fox 1 2 1 0",
        "ranked by number of images, largest first",
        "kept 19 of 23 images in 4 classes: largest 8, smallest 1, imbalance ratio 8.0; "
        "left out 0 other files or hidden entries",
    ]
    assert run("src out") == 0
    assert capsys.readouterr().out == f"{report}written to out\n"


def test_the_chart_shows_every_class_before_and_after(src):
    assert run("src out --dry-run --chart c.svg") == 0 and set(os.listdir()) == {"src", "c.svg"}
    root = ET.parse("c.svg").getroot()
    for kind, sizes in (("before", "8771"), ("after", "8641")):
        bars = root.find(f"{{*}}g[@class='{kind}']")
        # 4 classes on 900, 8 images on 330, upwards from 420.
        assert bars.get("transform") == "translate(70 420) scale(225.0 -41.25)"
        assert [bar.get("x") for bar in bars] == list("0123")
        assert [bar.get("height") for bar in bars] == list(sizes)
        assert bars[3][0].text == f"fox: 1 {kind}"
    texts = {"".join(each.itertext()): each for each in root.findall("{*}text")}
    assert texts["8"].get("y") == "96.00" and texts["2"].get("x") == "610.00"
    assert "\u25a0 before: 23 images, 1 to 8 a class" in texts
    assert "\u25a0 after: 19 images, 1 to 8 a class" in texts


@posix
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_stopped_copy_leaves_no_out_and_a_rerun_works(name, status):
    build("src/a/0.jpg src/b/0.jpg")
    for number in range(1, 3000):
        os.link("src/a/0.jpg", f"src/a/{number}.jpg")
    # Tests run in the background may have been told to ignore SIGINT, and would pass it on.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    for _ in range(10):  # on a busy machine the copy may be done before the signal is sent
        with start("src out", preexec_fn=default) as process:
            while process.poll() is None and not list(Path().glob(".data_creation-*/a")):
                time.sleep(0.001)
            process.send_signal(getattr(signal, name))
            stderr = process.communicate(timeout=30)[1]
        if process.returncode:
            break
        shutil.rmtree("out")
    assert process.returncode == status and "Traceback" not in stderr
    assert ("\ndata_creation.py: interrupted; nothing was" in stderr) == (name == "SIGINT")
    assert not os.path.exists("out") and (os.listdir() == ["src"] or name == "SIGKILL")
    assert run("src out --link") == 0 and len(files("out")) == 3001


def test_a_second_ctrl_c_does_not_stop_the_cleaning(monkeypatch):
    build("src/a/0.jpg src/a/1.jpg src/b/0.jpg")
    meant = []

    def note(*places, remove=shutil.rmtree, **options):
        meant.extend(signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM))
        remove(*places, **options)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(shutil, "copyfile", interrupt)
    monkeypatch.setattr(shutil, "rmtree", note)
    assert run("src out --step 0") == 130 and os.listdir() == ["src"]
    assert meant == [signal.SIG_IGN] * 2 and signal.getsignal(signal.SIGINT) is before


def test_the_current_folder_is_not_replaced(monkeypatch, capsys):
    build("src/a/0.jpg src/b/0.jpg empty/")
    monkeypatch.chdir("empty")
    assert run("../src .") == 2 and os.listdir() == []
    assert "the current folder" in capsys.readouterr().err


@posix
def test_failed_copy_leaves_no_output():
    import resource

    build("src/a/1.jpg src/a/2.jpg src/a/3.jpg src/b/big.jpg")
    Path("src/b/big.jpg").write_bytes(bytes(300_000))
    before = tree()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    with start("src out", preexec_fn=limit) as process:
        message = process.communicate(timeout=30)[1].splitlines()[-1]
    assert process.returncode == 2 and tree() == before
    assert message.startswith("data_creation.py: error: ") and "big.jpg" in message


def test_a_full_disk_is_told_before_anything_is_written(src, capsys, monkeypatch):
    little = shutil.disk_usage(".")._replace(free=99)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    before = tree()
    assert run("src out") == 2 and tree() == before
    [message] = capsys.readouterr().err.splitlines()
    assert message.startswith(f"data_creation.py: error: {src.parent / 'out'}: ")
    assert "MB free" in message
    assert run("src out --link") == 0  # needs no room


def test_the_script_repeats_itself_and_shows_its_progress_in_a_terminal(src, monkeypatch):
    with start("src out --seed 7") as process:
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0 and stderr == ""  # no terminal, no bar
    assert stdout.startswith("rank ") and stdout.endswith("\nwritten to out\n")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run("src again --seed 7") == 0 and "19/19" in sys.stderr.getvalue()
    assert files("again") == files("out")


def test_the_script_starts_and_draws_without_heavy_libraries(src):
    program = "import sys, data_creation as d; d.main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", program, src, src.parent / "out", "--dry-run"]
    command += ["--chart", src.parent / "c.svg"]
    folder = Path(data_creation.__file__).parent
    loaded = subprocess.check_output(command, cwd=folder, text=True).splitlines()[-1].split()
    assert "argparse" in loaded and os.path.exists("c.svg")
    assert not {"torch", "torchvision", "numpy", "PIL", "tqdm"} & set(loaded)


# What is wrong | what is there beside SRC | the command line | what the message says (~: here)
ERRORS = """
    SRC is missing | src/ | go\x1bne out | ~/go\\x1bne:
    SRC holds images but no class folders | flat/1.jpg flat/2.jpg | flat out | ~/flat:
    a class has no images | src/c/readme.txt | src out | ~/src/c:
    SRC is two levels too deep | dp/i/Im/a/1.jpg dp/i/Im/b/1.jpg | dp out | ~/dp/i/Im instead
    OUT is not empty | out/old.txt | src out | ~/out:
    OUT is inside SRC | src/ | src src/out | ~/src/out:
    OUT is inside a class behind a link | far/1.jpg src/c->far | src far/out | ~/far/out:
    SRC has parts | p/test/a/1.jpg p/train/a/1.jpg p/x/ | p out | data_creation.py ~/p/train OUT,
    an image is a dangling link | src/a/x.jpg->gone | src out | ~/src/a/x.jpg:
    a link leads back up | src/a/up->src | src out | ~/src/a/up:
    an image is a pipe | src/a/x.jpg| | src out | ~/src/a/x.jpg:
    the manifest is inside SRC | src/ | src out --manifest src/t.csv | ~/src/t.csv:
    the manifest is inside OUT | out/ | src out --manifest out/t.csv | ~/out/t.csv:
    the chart is the manifest | src/ | src out --chart c.svg --manifest c.svg | ~/c.svg:
    the chart is no SVG | src/ | src out --chart c.png | argument --chart: 'c.png' does not end
    the step is negative | src/ | src out --step -1 | argument --step:
    the step is too large | src/ | src out --step 3 | --step 3:
    a flag is unknown | src/ | src out --ha\x1brd | arguments: --ha\\x1brd;
"""
CASES = [[cell.strip() for cell in row.split(" | ")] for row in ERRORS.strip().splitlines()]


@pytest.mark.parametrize(
    ("plan", "line", "named"), [pytest.param(*case, id=name) for name, *case in CASES]
)
def test_bad_input_is_told_in_one_line_and_writes_nothing(plan, line, named, tmp_path, capsys):
    if os.name != "posix" and any(sign in plan for sign in ("->", "|")):
        pytest.skip("needs POSIX links")
    build("src/a/1.jpg src/a/2.jpg src/a/3.jpg src/b/1.jpg " + plan)
    before = tree()
    assert run(line) == 2 and tree() == before  # no OUT, no `.data_creation-*`, SRC as it was
    stdout, stderr = capsys.readouterr()
    [error] = stderr.splitlines()
    assert stdout == "" and error.startswith("data_creation.py: error: ")
    assert named.replace("~", str(tmp_path)).replace("/", os.sep) in error
