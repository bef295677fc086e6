"""The cache of rendered splits: the same pictures with it and without, whatever becomes of its files."""

import importlib
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from fpn_ablate.data.shapes import ShapesDataset, World, cache
from fpn_ablate.utils import content

dataset = importlib.import_module("fpn_ablate.data.shapes.dataset")
WORLD, SIZE = World(height=40, width=48, seed=5, objects=(0, 3), distractors=(2, 4)), 5
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache's folder of pictures, on a disk with any room, where digests are cached at once."""
    monkeypatch.setenv("FPN_ABLATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "FREE", 0)
    monkeypatch.setattr(content, "RECENT", -60)
    return tmp_path / "cache" / "shapes"


@pytest.fixture
def rendered(monkeypatch):
    """The positions of the pictures that are rendered, in this process."""
    positions, render = [], dataset.render_sample
    monkeypatch.setattr(dataset, "render_sample", lambda *a: positions.append(a[2]) or render(*a))
    return positions


def split(world=WORLD, name="val", size=SIZE, processes=1):
    made = ShapesDataset(world, name, size)
    made.render_all(processes)
    return made


def content_of(made):
    samples = [made[n] for n in range(len(made))]
    arrays = [getattr(s, part) for s in samples for part in ("image", "boxes", "labels", "crowd")]
    return [(a.shape, a.dtype, a.tobytes()) for a in arrays], [(s.image_id, s.masks) for s in samples], made.coco()


@pytest.fixture(scope="module")
def plain():
    """The content of the split, rendered before a test has a cache."""
    return content_of(ShapesDataset(WORLD, "val", SIZE))


@pytest.mark.parametrize("processes", [1, 2])
def test_cached_pictures_are_those_rendered_and_lie_in_shared_memory(plain, folder, rendered, processes):
    first = split(processes=processes)
    assert {file.suffix for file in folder.iterdir()} == {".npz", ".pixels"}
    rendered.clear()
    second = split()
    asked = ShapesDataset(WORLD, "val", SIZE)  # without `render_all`, as the commands that read finished runs
    assert content_of(first) == content_of(second) == content_of(asked) == plain
    assert not rendered
    for made in (first, second, asked):
        bases = [made[n].image.base for n in range(SIZE)]
        assert all(isinstance(base, np.memmap) or isinstance(base.base, np.memmap) for base in bases)


@pytest.mark.parametrize("other", [{"world": replace(WORLD, noise=7.0)}, {"name": "train"}, {"size": SIZE + 1}])
def test_another_world_split_or_size_is_rendered(rendered, other):
    split()
    rendered.clear()
    assert len(split(**other)) == len(rendered) == len(set(rendered))


@pytest.mark.parametrize(
    "what", ["draw.py", "render.py", "world.py", "dataset.py", "cache.py", "seeding.py", "rle.py", "numpy"]
)
def test_other_code_renders_anew(rendered, monkeypatch, what):
    split()
    rendered.clear()
    cache._renderer.cache_clear()
    if what == "numpy":
        monkeypatch.setattr(np, "__version__", "0")
    else:
        real = cache.source_digest
        monkeypatch.setattr(cache, "source_digest", lambda file: "edited" if file.name == what else real(file))
    try:
        split()
    finally:
        cache._renderer.cache_clear()
    assert len(rendered) == SIZE


def flip(file):
    """Change one byte of the content, the size and the time of modification stay."""
    before, whole = file.stat(), bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 255
    file.write_bytes(whole)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("suffix", [".npz", ".pixels"])
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-7]),
        lambda file: file.write_bytes(file.read_bytes() + b"more"),
    ],
    ids=["flipped", "absent", "empty", "short", "long"],
)
def test_a_damaged_file_is_written_anew(plain, folder, rendered, suffix, damage):
    split()
    (file,) = folder.glob(f"*{suffix}")
    whole = file.read_bytes()
    damage(file)
    rendered.clear()
    assert content_of(split()) == plain
    assert content_of(split()) == plain
    assert len(rendered) == SIZE or (suffix == ".npz" and not rendered)  # a zip archive may have bytes that nothing reads
    if rendered and suffix == ".pixels":
        assert file.read_bytes() == whole


def no_folder(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")


def no_home(tmp_path, monkeypatch):
    monkeypatch.delenv("FPN_ABLATE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(content.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))


def nearly_full(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FREE", 2**60)


def full(tmp_path, monkeypatch):
    def write(path, samples):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write_pixels", write)


@pytest.mark.parametrize("fault", [no_folder, no_home, nearly_full, full])
def test_without_a_disk_that_takes_them_pictures_are_rendered(plain, tmp_path, folder, monkeypatch, capsys, rendered, fault):
    fault(tmp_path, monkeypatch)
    cache._logged.clear()
    assert content_of(split()) == plain
    split(name="train")
    assert len(rendered) == 2 * SIZE  # each once
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "FPN_ABLATE_CACHE=FOLDER names another" in lines[0]
    assert not folder.is_dir() or not any(folder.iterdir())


NBYTES = SIZE * 40 * 48 * 3  # pixels of a split
OTHERS = [replace(WORLD, seed=seed) for seed in range(4)]


def used(folder, age):
    """Let the last use of all files in the cache be `age` seconds ago."""
    for file in folder.iterdir():
        os.utime(file, (time.time() - age,) * 2)


def held():
    """Which of the worlds OTHERS have a split in the cache, without a use of it."""
    paths = [cache._path(ShapesDataset(world, "val", SIZE).digest) for world in OTHERS]
    assert all(path.exists() == path.with_suffix(".pixels").exists() for path in paths)
    return [n for n, path in enumerate(paths) if path.exists()]


def test_splits_unused_for_longest_make_room(folder, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 2 * NBYTES + 10_000)
    split(OTHERS[0])
    used(folder, 3 * cache.IN_USE)
    split(OTHERS[1])
    for file in set(folder.iterdir()) - {cache._path(ShapesDataset(OTHERS[0], "val", SIZE).digest)}:
        os.utime(file, (time.time() - 2 * cache.IN_USE,) * 2)
    split(OTHERS[0])  # read
    split(OTHERS[2])
    assert held() == [0, 2]


def test_splits_in_use_stay_and_the_new_one_is_rendered_again(folder, monkeypatch, rendered, capsys):
    """Two splits that do not fit together would otherwise remove each other at every start."""
    monkeypatch.setattr(cache, "LIMIT", 2 * NBYTES + 10_000)
    for world in OTHERS[:3]:
        cache._logged.clear()
        split(world)
    assert held() == [0, 1]
    assert capsys.readouterr().out.count("used within 60 minutes; FPN_ABLATE_CACHE=FOLDER names another") == 1
    rendered.clear()
    for world in OTHERS[:2]:
        split(world)
    assert not rendered


def test_a_split_beyond_the_limit_removes_nothing_and_is_logged(folder, monkeypatch, capsys):
    split(OTHERS[0])
    used(folder, 2 * cache.IN_USE)
    monkeypatch.setattr(cache, "LIMIT", 2 * NBYTES)
    cache._logged.clear()
    split(size=3 * SIZE)
    assert held() == [0]
    line = capsys.readouterr().out
    assert "more than the cache's" in line and "FPN_ABLATE_CACHE" not in line


def test_temporaries_of_other_writers_stay_until_they_are_old(folder, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 2 * NBYTES)
    folder.mkdir(parents=True)
    temporary = folder / ".a.pixels.1-host.pixels"
    temporary.write_bytes(bytes(NBYTES + 1))
    split(OTHERS[0])
    assert temporary.exists() and held() == []
    used(folder, 2 * cache.IN_USE)  # of a killed writer
    split(OTHERS[0])
    assert not temporary.exists() and held() == [0]


def in_a_process(function, queue=None):
    process = FORK.Process(target=function, args=(queue,) if queue else ())
    process.start()
    return process


def test_of_two_processes_at_once_one_renders_and_both_have_the_pictures(plain, rendered, monkeypatch):
    render, queue = dataset.render_sample, FORK.Queue()
    monkeypatch.setattr(dataset, "render_sample", lambda *a: time.sleep(0.1) or render(*a))
    processes = [in_a_process(lambda q: q.put((content_of(split()) == plain, len(rendered))), queue) for _ in range(2)]
    ends = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert ends == [(True, 0), (True, SIZE)]


def test_processes_that_render_different_splits_make_room_one_after_the_other(folder, monkeypatch):
    inside, make_room = FORK.Value("i", 0), cache._make_room

    def watched(*args):
        with inside.get_lock():
            inside.value += 1
        time.sleep(0.1)
        assert inside.value == 1
        make_room(*args)
        inside.value -= 1

    monkeypatch.setattr(cache, "_make_room", watched)
    processes = [in_a_process(lambda world=world: split(world)) for world in OTHERS]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(OTHERS) and held() == [0, 1, 2, 3]


@pytest.mark.parametrize("where", ["_write_pixels", "_digest"])
def test_a_process_killed_while_it_writes_leaves_nothing_that_is_read(plain, folder, rendered, monkeypatch, where):
    def killed(path, *samples):
        path.write_bytes(b"some") if samples else None
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(cache, where, killed)
        process = in_a_process(split)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(folder.iterdir()) and not rendered
    assert content_of(split()) == plain
    assert len(rendered) == SIZE
