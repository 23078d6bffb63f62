"""Files that anyone may have written: each is read, or refused by an error that names it; none brings a traceback."""

import gzip
import io
import json
import random
import shutil
import struct
import tarfile
import zipfile
import zlib

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.train import archives, image_files
from fastattn.train.classify import ClassificationData, ClassificationTask, explain_texts, load_classifier
from fastattn.train.coco import CocoFolder
from fastattn.train.errors import CheckpointError, DataError, TrainingError
from fastattn.train.input_files import read_bytes, read_json
from fastattn.train.loop import Run
from fastattn.train.options import TrainOptions
from fastattn.train.scenes import write_scenes
from fastattn.train.text_files import read_imdb, read_labelled, read_pairs

CPU = torch.device("cpu")
TEXTS = [(f"{'good' if i % 2 else 'bad'} film number {i}", "ab"[i % 2]) for i in range(12)]
OPTIONS = TrainOptions(steps=2, batch_size=4)


def fuzz(examples=25):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def classification_task():
    data = ClassificationData(TEXTS, TEXTS)
    return ClassificationTask(data, min_frequency=1, embed_dim=8, num_heads=2, layers=1, feedforward_dim=8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "classify"
    Run(classification_task(), OPTIONS, directory).train()
    return directory


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 3, seed=3)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A directory for each test's copies."""
    return tmp_path_factory.mktemp("spoilt")


def copy_of(directory, spoilt):
    copy = spoilt / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    return copy


def fresh(directory, name, content):
    """The directory's file with this content; the old one is not overwritten, for it may be mapped into memory."""
    (directory / name).unlink(missing_ok=True)
    (directory / name).write_bytes(content)


def use_classifier(directory):
    explain_texts(*load_classifier(directory, CPU), ["Not a bad film, zzz ü 🙂"], CPU)


def resume(directory):
    run = Run(classification_task(), TrainOptions(steps=3, batch_size=4), directory, resume=True)
    run.train()


def use_scenes(directory):
    data = CocoFolder(directory)
    return [data[i] for i in range(len(data))]


def accepts_or_names(use, directory, name):
    """Use the directory; an error must be a TrainingError of one line that names the file, or the folder's other."""
    try:
        use(directory)
    except TrainingError as error:
        assert str(directory) in str(error), error
        assert len(str(error).splitlines()) == 1, error
        assert len(str(error)) < 1000, error


NASTY = [None, True, False, -1, 0, 1, 7, 1 << 31, 1 << 70, 10**400, 0.5, -0.5, 1e300, float("nan"), float("inf")]
NASTY += ["", "x", "1", "\0", "../x", "ü" * 9, "\ud800", [], [1], [None], {}, {"id": 1}, [[]] * 3, "a" * 300]


def places(value, path=()):
    """The paths of every value in a tree of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def replaced(value, path, new):
    """The tree with the value at the path replaced."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def removed(value, path):
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = removed(value[path[0]], path[1:])
    return copy


@st.composite
def spoilt_json(draw, text):
    value = json.loads(text)
    path = draw(st.sampled_from(sorted(places(value), key=repr)))
    if path and draw(st.integers(0, 4)) == 0:
        return json.dumps(removed(value, path)).encode()
    return json.dumps(replaced(value, path, draw(st.sampled_from(NASTY)))).encode()


@st.composite
def spoilt_bytes(draw, data):
    """Cut off, or with some bytes changed, taken out or put in; or bytes of no meaning."""
    kind = draw(st.sampled_from(["cut", "changed", "cut out", "put in", "random"]))
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    place = rng.randrange(len(data))
    if kind == "cut":
        return data[:place]
    if kind == "cut out":
        return data[:place] + data[place + rng.randrange(1, 200) :]
    if kind == "put in":
        return data[:place] + rng.randbytes(rng.randrange(1, 200)) + data[place:]
    if kind == "random":
        return rng.randbytes(rng.randrange(300))
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 9)):
        # near the front more often: headers lie there
        changed[min(int(rng.expovariate(1 / 200)), len(data) - 1)] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("name", ["run.json", "labels.json", "tokenizer.json"])
def test_json_of_a_run_with_a_value_of_nonsense(classifier, spoilt, name):
    directory = copy_of(classifier, spoilt)

    @fuzz()
    @given(spoilt_json((classifier / name).read_text()))
    def check(content):
        fresh(directory, name, content)
        accepts_or_names(use_classifier, directory, name)

    check()


@pytest.mark.parametrize("name", ["run.json", "labels.json", "tokenizer.json", "model.safetensors"])
def test_damaged_files_of_a_run(classifier, spoilt, name):
    directory = copy_of(classifier, spoilt)

    @fuzz()
    @given(spoilt_bytes((classifier / name).read_bytes()))
    def check(content):
        fresh(directory, name, content)
        accepts_or_names(use_classifier, directory, name)

    check()


def test_damaged_checkpoints(classifier, spoilt):
    directory = copy_of(classifier, spoilt)

    @fuzz(15)
    @given(spoilt_bytes((classifier / "checkpoint.pt").read_bytes()))
    def check(content):
        fresh(directory, "checkpoint.pt", content)
        accepts_or_names(lambda d: Run(classification_task(), OPTIONS, d, resume=True), directory, "checkpoint.pt")

    check()


def test_checkpoints_with_a_value_of_nonsense(classifier, spoilt):
    """At every place of the state that is no weight."""
    directory = copy_of(classifier, spoilt)
    whole = torch.load(classifier / "checkpoint.pt", weights_only=True)
    nasty = [value for value in NASTY if value != "\ud800"] + [torch.ones(2), torch.ones(3, dtype=torch.bool)]
    where = [path for path in places(whole) if path and path[0] not in ("model",)]

    @fuzz(8)
    @given(st.sampled_from(where), st.sampled_from(nasty))
    def check(path, value):
        shutil.rmtree(directory)
        shutil.copytree(classifier, directory)
        torch.save(replaced(whole, path, value), directory / "checkpoint.pt")
        accepts_or_names(resume, directory, "checkpoint.pt")

    check()


def test_annotations_with_a_value_of_nonsense(scenes, spoilt):
    directory = copy_of(scenes, spoilt)

    @fuzz()
    @given(spoilt_json((scenes / "annotations.json").read_text()))
    def check(content):
        fresh(directory, "annotations.json", content)
        accepts_or_names(use_scenes, directory, "annotations.json")

    check()


@pytest.mark.parametrize("name", ["annotations.json", "000000.png"])
def test_damaged_scenes(scenes, spoilt, name):
    directory = copy_of(scenes, spoilt)

    @fuzz()
    @given(spoilt_bytes((scenes / name).read_bytes()))
    def check(content):
        fresh(directory, name, content)
        accepts_or_names(use_scenes, directory, name)

    check()


@pytest.mark.parametrize("kind", ["jpeg", "gif", "bmp", "tiff", "webp", "ppm", "ico", "tga", "pcx"])
def test_damaged_images(spoilt, kind):
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (17, 11), (200, 100, 50)).save(stream, kind)

    @fuzz()
    @given(spoilt_bytes(stream.getvalue()))
    def check(content):
        fresh(spoilt, f"image.{kind}", content)
        accepts_or_names(lambda d: CocoFolder.read(d / f"image.{kind}", 3), spoilt, kind)

    check()


IMDB = {f"aclImdb/{s}/{k}/{i}_1.txt": f"{k} {i}" for s in ("train", "test") for k in ("neg", "pos") for i in range(2)}


def imdb_tar(mode="w:gz", members=IMDB):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_damaged_archives(spoilt, mode):
    whole = imdb_tar(mode)
    fresh(spoilt, "imdb.tar", whole)
    expected = read_imdb(spoilt / "imdb.tar")
    assert [len(part) for part in expected] == [4, 4]

    @fuzz()
    @given(spoilt_bytes(whole))
    def check(content):
        fresh(spoilt, "imdb.tar", content)
        accepts_or_names(lambda d: read_imdb(d / "imdb.tar"), spoilt, "imdb.tar")

    check()


@pytest.mark.parametrize("name", ["texts.csv", "texts.tsv", "pairs.tsv"])
def test_damaged_texts(spoilt, name):
    separator = "\t" if name.endswith("tsv") else ","
    reader = read_pairs if name == "pairs.tsv" else read_labelled
    rows = TEXTS if reader is read_pairs else [("text", "label"), *TEXTS]
    whole = "".join(separator.join(row) + "\n" for row in rows).encode()
    fresh(spoilt, name, whole)
    assert reader(spoilt / name) == TEXTS

    @fuzz()
    @given(spoilt_bytes(whole))
    def check(content):
        fresh(spoilt, name, content)
        accepts_or_names(lambda d: reader(d / name), spoilt, name)

    check()


def test_a_device_without_end_is_not_read_to_its_end(monkeypatch):
    with pytest.raises(DataError, match="/dev/zero: more than 1000 bytes, the most that is read"):
        read_bytes("/dev/zero", most=1000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, r"a\.json: not JSON that can be read: it is nested too deep"),
        (b'{"a": ' * 100_000, r"a\.json: not JSON that can be read: it is nested too deep"),
        (b'["\xff"]', r"a\.json:1: not UTF-8 \(byte 0xff\)"),
        (b'{"a": 1, "a": 2}', r"a\.json: not JSON: the key 'a' stands twice in one object"),
        (b"[1,\n2", r"a\.json:2: not JSON: "),
        (b"", r"a\.json:1: not JSON: "),
    ],
)
def test_what_is_no_json(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(id=1), r"annotation 1: the id 1 is annotation 1's already"),
        (lambda c: c["images"][1].update(id=0), r"images\[1\]: the id 0 is .*images\[0\]'s already"),
        (lambda c: c["categories"][1].update(id=0), r"categories\[1\]: the id 0 is .*categories\[0\]'s already"),
        (lambda c: c["annotations"][0].update(bbox=[True, 2, 3, 5]), r"annotation 1: bbox must be .*, got \[True, 2"),
        (lambda c: c["annotations"][0].update(bbox=[-2, 2, 3, 5]), r"annotation 1: bbox .* reaches beyond its image"),
        (lambda c: c["annotations"][0].update(bbox=[2, 2, 300, 5]), r"annotation 1: bbox .* reaches beyond its image"),
        (lambda c: c["annotations"][0].update(image_id=True), "annotation 1: image_id must be an int, got True"),
        (lambda c: c["annotations"][0].update(category_id="1"), "annotation 1: category_id must be an int, got '1'"),
        (lambda c: c["annotations"][0].update(image_id=[0]), r"annotation 1: image_id must be an int, got \[0\]"),
        (lambda c: c["annotations"][0].update(iscrowd=2), "annotation 1: iscrowd must be at least 0 and at most 1"),
        (lambda c: c["annotations"][0].update(area=float("nan")), "annotation 1: area must be at least 0 and finite"),
        (lambda c: c["annotations"][0].update(id=1 << 64), "id must be at least"),
        (lambda c: c["images"][0].update(file_name="a\0b"), r"images\[0\]: file_name must be the name of a file"),
        (lambda c: c["images"][0].update(file_name=5), r"images\[0\]: file_name must be a str, got 5"),
        (lambda c: c["images"][0].update(height="9"), r"images\[0\]: height must be an int, got '9'"),
        (lambda c: c["categories"][0].update(name=None), r"categories\[0\]: name must be a str, got None"),
        (lambda c: c.update(annotations={}), "annotations must be a list, got a dict of 0"),
    ],
)
def test_annotations_of_nonsense_are_named(scenes, spoilt, change, message):
    directory = copy_of(scenes, spoilt)
    coco = json.loads((scenes / "annotations.json").read_text())
    change(coco)
    fresh(directory, "annotations.json", json.dumps(coco).encode())
    with pytest.raises(DataError, match=r"annotations\.json: .*" + message):
        CocoFolder(directory)


def test_a_box_may_round_beyond_its_image_by_a_pixel(scenes, spoilt):
    directory = copy_of(scenes, spoilt)
    coco = json.loads((scenes / "annotations.json").read_text())
    height, width = coco["images"][0]["height"], coco["images"][0]["width"]
    coco["annotations"][0]["bbox"] = [-0.5, 0, width + 1.0, height + 0.9]
    fresh(directory, "annotations.json", json.dumps(coco).encode())
    assert CocoFolder(directory).objects[0][0][1] == [-0.5, 0, width + 1.0, height + 0.9]


def test_an_image_that_expands_is_refused_by_its_header(tmp_path, monkeypatch):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"bomb\.png: cannot be read as an image: .*2500000000 pixels"):
        CocoFolder.read(tmp_path / "bomb.png", 1)
    monkeypatch.setattr(image_files, "MOST_PIXELS", 100)
    from PIL import Image

    Image.new("L", (11, 10)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"large\.png: cannot be read as an image: 11 x 10 pixels, more than the 100"):
        CocoFolder.read(tmp_path / "large.png", 1)


def test_archives_that_expand_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "imdb.tar.gz"

    def refused(content, message):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"imdb\.tar\.gz: " + message):
            read_imdb(path)

    monkeypatch.setattr(archives, "MOST_OF_A_MEMBER", 50_000)
    refused(
        imdb_tar(members=IMDB | {"aclImdb/train/neg/9_1.txt": "a" * 60_000}), ".*9_1.txt' has 60000 bytes, too many"
    )
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40  # tarfile reads such a header whole
    refused(
        gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(10_000)), "a part of 1099511627776 bytes is too large"
    )
    monkeypatch.setattr(archives, "MOST_OF_ALL", 1 << 20)
    refused(imdb_tar(members={"train/neg/readme": "a" * (1 << 21)} | IMDB), "expands to more than 1048576 bytes")


def test_an_archive_that_ends_early_is_not_taken_for_whole(tmp_path):
    """Cut between two members, or with a header that is none: tarfile says nothing."""
    whole = imdb_tar("w")
    path = tmp_path / "imdb.tar"
    for content in (whole[: 6 * 1024], whole[: 6 * 1024] + b"?" * 1024 + whole[7 * 1024 :]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="truncated or damaged at byte 6144"):
            read_imdb(path)


def test_a_checkpoint_that_expands_is_refused(classifier, spoilt):
    directory = copy_of(classifier, spoilt)
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(classifier / "checkpoint.pt") as whole,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as zip,
    ):
        for name in whole.namelist():
            zip.writestr(name, whole.read(name))
    fresh(directory, "checkpoint.pt", stream.getvalue())
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: truncated, or not a checkpoint \(.* is compressed\)"):
        Run(classification_task(), OPTIONS, directory, resume=True)


def test_a_tokenizer_of_another_model(classifier, spoilt):
    directory = copy_of(classifier, spoilt)
    tokenizer = json.loads((classifier / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["film"] = 5000
    fresh(directory, "tokenizer.json", json.dumps(tokenizer).encode())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has the token 5000, the model's are below"):
        load_classifier(directory, CPU)


def test_links_that_go_in_a_circle_and_directories_are_named(classifier, scenes, spoilt):
    for whole, name, use in (
        (classifier, "run.json", use_classifier),
        (classifier, "labels.json", use_classifier),
        (classifier, "tokenizer.json", use_classifier),
        (classifier, "model.safetensors", use_classifier),
        (classifier, "checkpoint.pt", resume),
        (scenes, "annotations.json", use_scenes),
        (scenes, "000000.png", use_scenes),
    ):
        directory = copy_of(whole, spoilt)
        (directory / name).unlink()
        (directory / name).symlink_to(name)
        with pytest.raises(TrainingError) as error:
            use(directory)
        assert str(directory) in str(error.value)
        (directory / name).unlink()
        (directory / name).mkdir()
        with pytest.raises(TrainingError) as error:
            use(directory)
        assert str(directory) in str(error.value)
