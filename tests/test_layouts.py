"""The same images in every layout that people have are the same data set; what is ambiguous or broken is refused."""

import csv
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_archive
from PIL import Image
from pyarrow.fs import LocalFileSystem

from raycifar.data import CIFAR100
from raycifar.data.dataset import to_images
from raycifar.data.pictures import read_image
from raycifar.data.sources import load
from raycifar.data.trees import Gunzipped
from raycifar.errors import RequestError
from raycifar.terminal import Screen
from raycifar.workflows.datasets import count_repeats, warn_of_leaks, write_parquet


@pytest.fixture(scope="module")
def images(small_arrays):
    """The small data set, by split: pixels (N, 32, 32, 3), fine and coarse labels, PNG files."""
    return {
        split: (pixels.transpose(0, 2, 3, 1), fine, np.array(CIFAR100.superclass_of)[fine], [png(x) for x in pixels])
        for split, (pixels, fine, _) in small_arrays.items()
    }


@pytest.fixture(scope="module")
def fingerprint(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    python(folder, images)
    return load(str(folder)).fingerprint


def png(pixels, size=(32, 32)):
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).resize(size).save(file, "png")
    return file.getvalue()


def python(folder, images, protocol=2, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for split, (pixels, fine, coarse, _) in images.items():
        flat = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        fields = {b"data": flat, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
        fields |= {name.encode(): value for name, value in changes.items()}
        (folder / split).write_bytes(pickle.dumps(fields, protocol))


def binary(folder, images):
    for split, (pixels, fine, coarse, _) in images.items():
        flat = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        records = np.concatenate([np.stack([coarse, fine], 1).astype(np.uint8), flat], axis=1)
        (folder / f"{split}.bin").write_bytes(records.tobytes())


def hub_table(content, image="img", fine="fine_label", coarse="coarse_label", cells=None, labels=None):
    _, numbers, superclasses, files = content
    cells = cells or pa.array([{"bytes": file, "path": None} for file in files])
    columns = {image: cells, fine: pa.array(numbers) if labels is None else labels}
    return pa.table(columns | ({coarse: superclasses} if coarse else {}))


def parquet(folder, images, name="{}-00000-of-00001.parquet", **columns):
    for split, content in images.items():
        path = folder / name.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {key: value(content) if callable(value) else value for key, value in columns.items()}
        pq.write_table(hub_table(content, **values), path)


def in_parts(folder, images, name):
    """Two Parquet files a split, in its folder."""
    for part, rows in enumerate((slice(100), slice(100, None))):
        parquet(
            folder, {split: [each[rows] for each in x] for split, x in images.items()}, "{}/" + name.format(part=part)
        )


def pictures(folder, images, name):
    for split, (_, fine, coarse, files) in images.items():
        for row, file in enumerate(files):
            names = {"fine": CIFAR100.class_names[fine[row]], "coarse": CIFAR100.superclass_names[coarse[row]]}
            names["number"] = f"{fine[row]:02}"
            path = folder / name.format(split=split, **names) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)


def arrow(folder, images, writer):
    for split, content in images.items():
        (folder / split).mkdir()
        table = hub_table(content)
        with writer(folder / split / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table)


def npz(path, images, pixels="x_{}", labels="y_{}"):
    arrays = {}
    for split, (values, fine, _, _) in images.items():
        arrays |= {pixels.format(split): values, labels.format(split): fine[:, None]}
    np.savez_compressed(path, **arrays)


def csv_files(folder, images):
    for split, (pixels, fine, _, _) in images.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["label", *(f"pixel{k}" for k in range(3072))])
            flat = pixels.transpose(0, 3, 1, 2).reshape(len(fine), -1)
            rows.writerows([label, *values] for label, values in zip(fine, flat, strict=True))


def beside_a_run(folder, images):
    python(folder / "cifar-100-python", images)
    run = folder / "results/test"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    for name in ("predictions", "train"):
        pq.write_table(pa.table({"label": [1]}), run / f"{name}.parquet")


def archived(folder, images, kind):
    python(folder / "unpacked/cifar-100-python", images)
    shutil.make_archive(str(folder / "copy"), kind, folder / "unpacked")
    shutil.rmtree(folder / "unpacked")


GOOD = {
    "binary files": binary,
    "pickles of today": lambda f, x: python(f, x, protocol=5),
    "Parquet as on the hub": parquet,
    "class folders": lambda f, x: pictures(f, x, "{split}/{fine}"),
    "class folders, under train": lambda f, x: pictures(f, x, "train/{split}/{fine}"),
    "class folders, under test": lambda f, x: pictures(f, x, "test_data/{split}/{fine}"),
    "pickles without superclasses": lambda f, x: python(f, x, coarse_labels=None),
    "folders of numbers": lambda f, x: pictures(f, x, "{split}/{number}"),
    "superclass folders": lambda f, x: pictures(f, x, "cifar/{split}/{coarse}/{fine}"),
    "superclass folders, under train": lambda f, x: pictures(f, x, "train/{split}/{coarse}/{fine}"),
    "Parquet of images and labels": lambda f, x: parquet(f, x, image="image", fine="label", coarse=None),
    "Parquet of bytes": lambda f, x: parquet(f, x, cells=lambda c: pa.array(c[3])),
    "Parquet of names": lambda f, x: parquet(f, x, labels=lambda c: pa.array([CIFAR100.class_names[k] for k in c[1]])),
    "Parquet with a prefix": lambda f, x: parquet(f, x, "cifar100-{}.parquet"),
    "Parquet by folder, under test": lambda f, x: parquet(f / "test/cifar", x, "{}/0000.parquet"),
    "Parquet by folder, under train": lambda f, x: parquet(f / "train/cifar", x, "{}/0000.parquet"),
    "Parquet of Spark": lambda f, x: in_parts(f, x, "part-0000{part}-3f2a-c000.snappy.parquet"),
    "Parquet of Ray Data": lambda f, x: in_parts(f, x, "a1b2_00000{part}_000000.parquet"),
    "beside an evaluation": lambda f, x: [csv_files(f, x), (f / "evaluation.json").write_text("{}")],
    "Arrow streams": lambda f, x: arrow(f, x, pa.ipc.new_stream),
    "Arrow files": lambda f, x: arrow(f, x, pa.ipc.new_file),
    "npz": lambda f, x: npz(f / "cifar100.npz", x),
    "npz with other names": lambda f, x: npz(f / "c.npz", x, "{}_images", "{}_labels"),
    "CSV": csv_files,
    "zip": lambda f, x: archived(f, x, "zip"),
    "tar": lambda f, x: archived(f, x, "tar"),
    "tar.xz": lambda f, x: archived(f, x, "xztar"),
    "beside a run": beside_a_run,
}


@pytest.mark.parametrize("layout", GOOD)
def test_the_same_images_in_any_layout_are_the_same_data_set(tmp_path, images, fingerprint, layout):
    GOOD[layout](tmp_path, images)
    assert load(str(tmp_path)).fingerprint == fingerprint


def test_any_layout_is_written_as_parquet(tmp_path, images, fingerprint):
    npz(tmp_path / "cifar100.npz", images)
    write_parquet(load(str(tmp_path / "cifar100.npz")), str(tmp_path / "there"), Screen(quiet=True))
    assert load(str(tmp_path / "there")).fingerprint == fingerprint


def test_a_parent_folder_does_not_decide_the_split(tmp_path, images):
    parquet(tmp_path / "test", images, "{}/0000.parquet")
    source = load(str(tmp_path / "test"))
    assert (len(source.train), len(source.test)) == (800, 300)


def extra_shard(folder, images):
    parquet(folder, images)
    shutil.copy(folder / "train-00000-of-00001.parquet", folder / "train_noisy-00000-of-00001.parquet")


def two_copies(folder, images):
    for name in ("b-noisy", "a-clean"):
        python(folder / name, images)


def two_snapshots(folder, images):
    for name in ("aaaa", "bbbb"):
        parquet(folder / "snapshots" / name, images)


def with_labels(values):
    return lambda f, x: parquet(f, x, labels=lambda c: pa.array([values[0], *values[1:] * (len(c[1]) - 1)]))


class ForgedType:
    def __reduce__(self):
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


class ForgedArray:
    def __reduce__(self):
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (4,), ForgedType(), False, b"A" * 32)


def nested(depth, start=b"\x80\x02}", end=b"s."):
    """A pickle of tuples in each other, as the key of a dictionary, whose hash takes all of the stack."""
    return start + b")" + b"\x85" * depth + b"K\x01" + end


REFUSED = {
    "two copies": (two_copies, "more than one data set, a-clean (cifar-100-python) and b-noisy (cifar-100-python)"),
    "two series in a folder": (
        lambda f, x: [parquet(f, x, f"{{}}/part-00000-{job}-c000.parquet") for job in "ab"],
        "several series of files, train/part-00000-a-c000.parquet and train/part-00000-b-c000.parquet: give a",
    ),
    "two snapshots": (two_snapshots, "more than one data set, snapshots/aaaa (Parquet) and snapshots/bbbb (Parquet)"),
    "an extra shard": (extra_shard, "several series of files, train"),
    "a missing shard": (lambda f, x: parquet(f, x, "{}-00000-of-00002.parquet"), "one of 2 files, and 1 are there"),
    "pictures without splits": (lambda f, x: pictures(f, x, "{fine}"), "must be in folders train/CLASS and test/CLASS"),
    "one split": (lambda f, x: parquet(f, {"train": x["train"]}), "it has no test split beside train-00000"),
    "no label": (with_labels([None, 1]), "has nothing in row 0 of the column fine_label"),
    "real labels": (with_labels([0.0, 1.0]), "has double in the column fine_label, not integers"),
    "truth labels": (with_labels([True, False]), "has bool in the column fine_label"),
    "listed labels": (with_labels([[0], [1]]), "has list<element: int64> in the column fine_label"),
    "unknown names": (
        with_labels(["apple", "whalee"]),
        "'whalee', which is not one of CIFAR-100's (did you mean 'whale'?)",
    ),
    "paths only": (
        lambda f, x: parquet(f, x, cells=lambda c: pa.array([{"bytes": None, "path": "x"}] * len(c[3]))),
        "has null in the column img.bytes",
    ),
    "small pictures": (
        lambda f, x: parquet(
            f, x, cells=lambda c: pa.array([{"bytes": png(np.zeros((3, 32, 32), np.uint8), (1, 32))}] * len(c[3]))
        ),
        "image 0 can't be read: it has 1×32 pixels, not 32×32",
    ),
    "forged labels": (
        lambda f, x: python(f, x, fine_labels=ForgedArray()),
        "an array is of type 'O8', not of numbers",
    ),
    "forged images": (lambda f, x: python(f, x, data=ForgedArray()), "an array is of type 'O8', not of numbers"),
    "labels in two columns": (
        lambda f, x: python(f, x, fine_labels=np.zeros((800, 2), int)),
        "not one integer an image",
    ),
    "too few labels": (lambda f, x: python(f, x, fine_labels=[1] * 799), "has 800 images and 799 fine labels"),
    "one number for labels": (lambda f, x: python(f, x, fine_labels=np.int64(3)), "are int64 of shape ()"),
    "huge labels": (lambda f, x: python(f, x, fine_labels=[10**30] * 800), "a number of more than 64 bits"),
    "a truth value": (lambda f, x: python(f, x, fine_labels=[True] * 800), "image 0 is a bool"),
    "deep keys": (lambda f, x: [(f / s).write_bytes(nested(10**5)) for s in x], "it lacks data and fine_labels"),
    "deep keys in pairs": (
        lambda f, x: [
            (f / s).write_bytes(nested(10**5, b"\x80\x02ccollections\nOrderedDict\n]", b"\x86a\x85R.")) for s in x
        ],
        "it lacks data and fine_labels",
    ),
    "a huge memo": (lambda f, x: [(f / s).write_bytes(b"\x80\x02K\x01r\xff\xff\xff\x7f.") for s in x], "holds a int"),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_what_is_ambiguous_or_broken_is_refused(tmp_path, images, layout):
    make, words = REFUSED[layout]
    make(tmp_path, images)
    with pytest.raises(RequestError) as refusal:
        load(str(tmp_path))
    assert words in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_a_number_in_a_name_may_have_any_length(tmp_path, images, fingerprint):
    parquet(tmp_path, images, "{}.parquet")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for split in images:
            archive.write(tmp_path / f"{split}.parquet", f"{split}-0-of-{'9' * 5000}.parquet")
    assert load(str(tmp_path / "a.zip")).fingerprint == fingerprint


def test_an_array_is_looked_at_before_it_is_made(tmp_path):
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", content)
    with pytest.raises(RequestError, match="int64 of shape"):
        load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (b"", "holds a bytes, not the dictionary of cifar-100-python"),
        ({"data": b"", "fine_labels": []}, "a bytes stands where an array should"),
        ({"data": b"x", "fine_labels": []}, "a bytes stands where an array should"),
        ({"data": {}, "fine_labels": []}, "a dictionary stands where an array should"),
        ({"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}, "train holds no images"),
    ],
)
def test_a_pickle_of_other_things_is_named_as_what_it_is_in_every_protocol(tmp_path, protocol, fields, says):
    for split in ("train", "test"):
        (tmp_path / split).write_bytes(pickle.dumps(fields, protocol))
    with pytest.raises(RequestError, match=says):
        load(str(tmp_path))


def test_an_archive_is_refused_before_it_is_read(tmp_path):
    def zeros(path, name, size, kind=tarfile.REGTYPE):
        header = tarfile.TarInfo(name)
        header.size, header.type = size, kind
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        return str(path)

    with pytest.raises(RequestError, match="has 2,147,483,648 bytes"):
        load(zeros(tmp_path / "bomb.tar", "x/train.bin", 2**31))
    with pytest.raises(RequestError, match="a header of 2,147,483,648 bytes"):
        load(zeros(tmp_path / "name.tar", "x", 2**31, tarfile.GNUTYPE_LONGNAME))
    with (
        zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("train.bin", "w") as file,
    ):
        for _ in range(700):
            file.write(bytes(2**20))
    with pytest.raises(RequestError, match="which is more than any copy of CIFAR-100"):
        load(str(tmp_path / "bomb.zip"))
    many = write_archive(tmp_path / "many.tar.gz", {})
    with tarfile.open(many, "w") as archive:
        for number in range(300):
            archive.addfile(tarfile.TarInfo(str(number)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raycifar.data.trees.MAX_MEMBERS", 200)
        with pytest.raises(RequestError, match="more than 200 members"):
            load(many)


@pytest.mark.parametrize("suffix", ["zip", "npz"])
def test_a_zip_whose_members_are_larger_than_it_says_takes_no_memory(tmp_path, suffix):
    real, said = (struct.pack("<I", size) for size in (67_654_321, 3074))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train.bin", "test.bin") if suffix == "zip" else ("x_train.npy", "y_train.npy", "x_test.npy"):
            archive.writestr(name, bytes(67_654_321))
    path = tmp_path / f"bomb.{suffix}"
    path.write_bytes(content.getvalue().replace(real, said))
    tracemalloc.start()
    with pytest.raises(RequestError, match=r"member .* can't be read: Bad CRC"):
        load(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_would_be_inflated_without_a_limit_is_refused(tmp_path, small_files, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for name, content in small_files.items():
            archive.writestr(name, content)
    with pytest.raises(RequestError, match=r"member .*\.bin isn't compressed by deflate: zip it that way\.$"):
        load(str(tmp_path / "a.zip"))


def tar_of(path, *members):
    """A tar of headers of a kind, each with what follows it."""
    blocks = []
    for kind, content in members:
        header = tarfile.TarInfo("train.bin")
        header.type, header.size = kind, len(content)
        blocks += header.tobuf(tarfile.GNU_FORMAT), content, bytes(-len(content) % 512)
    path.write_bytes(b"".join((*blocks, bytes(1024))))
    return str(path)


def test_a_tar_that_is_not_whole_is_refused(tmp_path, images):
    pictures(tmp_path / "a", images, "{split}/{fine}")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a/test", "test")
        archive.add(tmp_path / "a/train", "train")
    with tarfile.open(tmp_path / "a.tar") as archive:
        header = archive.getmembers()[-50].offset
    tar, path = (tmp_path / "a.tar").read_bytes(), tmp_path / "b.tar"
    for damaged in (tar[:header], tar[: header + 100], tar[:header] + b"?" + tar[header + 1 :]):
        for compress in (bytes, gzip.compress):
            path.write_bytes(compress(damaged))
            with pytest.raises(
                RequestError, match=r"is truncated or damaged \((it has no end mark|truncated|bad).*\): fetch it again"
            ):
                load(str(path))
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(RequestError, match="is not a tar or zip archive"):
        load(str(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_refused_by_what_they_are(tmp_path, kind):
    with pytest.raises(RequestError, match=r"train\.bin is a link: make the archive with tar -h --hard-dereference\.$"):
        load(tar_of(tmp_path / "a.tar", (kind, b"")))


def test_lists_of_the_parts_of_a_sparse_file_are_not_read(tmp_path):
    version = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    parts = b"9999999\n" + b"1\n" * 5000
    for members in [(tarfile.GNUTYPE_SPARSE, parts)], [(tarfile.XHDTYPE, version), (tarfile.REGTYPE, parts)]:
        with pytest.raises(RequestError, match=r"damaged \(a sparse file\)"):
            load(tar_of(tmp_path / "sparse.tar", *members))


def test_what_a_tar_says_of_all_its_members_does_not_pile_up(tmp_path):
    said = [b"".join(b"11 %06x=\n" % key for key in range(start, start + 5900)) for start in range(0, 118_000, 5900)]
    path = tar_of(tmp_path / "global.tar", *((kind, each) for each in said for kind in (tarfile.XGLTYPE, b"0")))
    tracemalloc.start()
    with pytest.raises(RequestError, match="no test split"):
        load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(("suffix", "kind"), [("jfif", "JPEG"), ("jpe", "JPEG"), ("avif", "AVIF"), ("jp2", "JPEG2000")])
def test_every_picture_that_is_read_by_itself_is_read_in_a_folder(tmp_path, images, suffix, kind):
    pictures(tmp_path, images, "{split}/{fine}")
    Image.new("RGB", (32, 32)).save(tmp_path / f"train/apple/more.{suffix}", kind)
    assert len(load(str(tmp_path)).train) == 801


def test_pictures_are_turned_as_they_are_where_a_network_is_asked(tmp_path, images):
    pictures(tmp_path, images, "{split}/{fine}")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = tmp_path / "train/apple/0turned.jpg"
    Image.fromarray(images["train"][0][0]).save(picture, exif=exif)
    turned = read_image(LocalFileSystem(), str(picture))
    assert any((image == turned).all() for image in to_images(load(str(tmp_path)).train["image"]))


def test_a_file_that_cannot_be_read_is_named(tmp_path, images):
    pictures(tmp_path, images, "{split}/{fine}")
    (tmp_path / "train/apple/large.png").write_bytes(bytes(2**20 + 1))
    with pytest.raises(RequestError, match=r": train/apple/large\.png can't be read: it has 1,048,577 bytes"):
        load(str(tmp_path))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", f"{tmp_path}/train/bear")

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(RequestError, match=r"/train/bear can't be read: Permission denied\.$"):
        load(str(tmp_path))


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_whose_writing_was_interrupted_are_refused(tmp_path, images, writer):
    arrow(tmp_path, images, writer)
    path, table = tmp_path / "train/data-00000-of-00001.arrow", hub_table(images["train"])
    sink, ends = pa.BufferOutputStream(), []
    file = writer(sink, table.schema)
    for batch in table.to_batches(300):
        file.write_batch(batch)
        ends.append(sink.tell())
    file.close()
    whole = sink.getvalue().to_pybytes()
    path.write_bytes(whole)
    assert len(load(str(tmp_path)).train) == 800
    for size in (*ends, ends[0] + 3, ends[1] + 4, ends[1] + 40):
        path.write_bytes(whole[:size])
        with pytest.raises(RequestError, match=r"arrow (ends early, as if its writing was interrupted|is damaged: )"):
            load(str(tmp_path))


def test_nothing_but_files_is_opened_and_no_link_to_a_folder_is_followed(tmp_path, images, fingerprint):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RequestError, match="not a file"):
        load(str(tmp_path / "fifo"))
    python(tmp_path / "data", images)
    (tmp_path / "data/round").symlink_to(tmp_path)
    assert load(str(tmp_path / "data")).fingerprint == fingerprint
    (tmp_path / "data/train").unlink()
    os.mkfifo(tmp_path / "data/train")
    with pytest.raises(RequestError, match="it has no train split"):
        load(str(tmp_path / "data"))


def test_more_synthetic_images_than_memory_holds_are_refused_at_once():
    with pytest.raises(RequestError, match="at most 1,000,000"):
        load("synthetic:1000000000000")


# A test set alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", GOOD)
def test_a_test_set_alone_is_read_in_any_layout_where_one_is_asked_for(tmp_path, images, layout):
    GOOD[layout](tmp_path, {"test": images["test"]})
    source = load(str(tmp_path), test_alone=True)
    assert len(source.train) == 0
    assert to_images(source.test["image"]).tobytes() == images["test"][0].transpose(0, 3, 1, 2).tobytes()
    assert source.test["fine"].to_pylist() == images["test"][1].tolist()
    assert source.superclass_of() == CIFAR100.superclass_of
    with pytest.raises(RequestError):
        load(str(tmp_path))


def test_a_file_of_test_images_is_read_by_its_own_name(tmp_path, images, small_files):
    alone = {"test": images["test"]}
    python(tmp_path, alone)  # as ciFAIR-100's
    parquet(tmp_path, alone)
    (tmp_path / "test.bin").write_bytes(small_files["test.bin"])
    (tmp_path / "mine.parquet").write_bytes((tmp_path / "test-00000-of-00001.parquet").read_bytes())
    for name in ("test", "test.bin", "test-00000-of-00001.parquet"):
        assert load(str(tmp_path / name), test_alone=True).test["fine"].to_pylist() == images["test"][1].tolist()
    with pytest.raises(RequestError, match="its name must say test"):
        load(str(tmp_path / "mine.parquet"), test_alone=True)


# Classes by name ------------------------------------------------------------------------------------

SHUFFLED = np.random.default_rng(0).permutation(100)
NAMES = [CIFAR100.class_names[k] for k in SHUFFLED]  # of another numbering
NUMBERS = np.argsort(SHUFFLED)  # in it, of each class


def renumbered(images):
    return {split: (x, NUMBERS[fine], coarse, files) for split, (x, fine, coarse, files) in images.items()}


def python_with_names(folder, images, names):
    python(folder, images)
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [name.encode() for name in names]}, protocol=2))


def binary_with_names(folder, images, names):
    binary(folder, images)
    (folder / "fine_label_names.txt").write_text("\n".join([*names, ""]))


def parquet_with_names(folder, images, names):
    feature = {"names": names, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"fine_label": feature}}})}
    for split, content in images.items():
        pq.write_table(hub_table(content).replace_schema_metadata(metadata), folder / f"{split}.parquet")


NAMED = {"python": python_with_names, "binary": binary_with_names, "Parquet": parquet_with_names}


@pytest.mark.parametrize("layout", NAMED)
def test_another_order_of_classes_is_seen_by_their_names(tmp_path, images, fingerprint, layout):
    NAMED[layout](tmp_path, renumbered(images), NAMES)
    assert load(str(tmp_path)).fingerprint == fingerprint


@pytest.mark.parametrize("layout", NAMED)
def test_names_of_other_classes_are_refused_and_one_misspelt_name_is_not(tmp_path, images, fingerprint, layout):
    NAMED[layout](tmp_path, renumbered(images), [name if name != "crab" else "cra" for name in NAMES])
    with pytest.raises(RequestError, match="names other fine classes than CIFAR-100's"):
        load(str(tmp_path))  # its place is another class's
    NAMED[layout](tmp_path, renumbered(images), [f"class {k}" for k in range(100)])
    with pytest.raises(RequestError, match="such as 'class 0'"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "name", [b")" + b"2\x86" * 40, b")" + b"\x85" * 5000, b"K\x01"], ids=["shared tuples", "deep tuples", "a number"]
)
def test_names_that_are_no_text_are_not_written_out(tmp_path, images, fingerprint, name):
    python(tmp_path, images)
    (tmp_path / "meta").write_bytes(b"\x80\x02}X\x10\0\0\0fine_label_names]" + name + b"as.")
    assert load(str(tmp_path)).fingerprint == fingerprint


@pytest.mark.parametrize(
    "names", ["[" * 10**5, '{"info": {"features": {"fine_label": {"names": [[]]}}}}'], ids=["deep lists", "a list"]
)
def test_what_a_parquet_file_says_of_its_classes_may_be_anything(tmp_path, images, fingerprint, names):
    for split, content in images.items():
        pq.write_table(
            hub_table(content).replace_schema_metadata({"huggingface": names}), tmp_path / f"{split}.parquet"
        )
    assert load(str(tmp_path)).fingerprint == fingerprint


def test_the_hub_s_crabs_are_crabs(tmp_path, images, fingerprint):
    parquet_with_names(tmp_path, images, [name.replace("crab", "cra") for name in CIFAR100.class_names])
    assert load(str(tmp_path)).fingerprint == fingerprint


# Test images among the training images --------------------------------------------------------------


class Said(list):
    say = list.append


def test_test_images_among_the_training_images_are_counted_and_told(tmp_path, images, small):
    said = Said()
    warn_of_leaks(load(small), said)
    assert said == []
    leaking = {**images, "test": tuple(values[:300] for values in images["train"])}
    python(tmp_path, leaking)
    source = load(str(tmp_path))
    warn_of_leaks(source, said)
    assert "300 of the 300 test images are also among the training images" in said[0]
    pixels = to_images(source.train["image"]).copy()
    assert count_repeats(source) == (len(pixels) - len({x.tobytes() for x in pixels}), 300)


def test_cifar_100_itself_has_ten(cifar):
    source = load(cifar)
    assert count_repeats(source) == (14, 10)
    assert source.superclass_of() == CIFAR100.superclass_of
    said = Said()
    warn_of_leaks(source, said)
    assert said == []


def test_several_gzip_streams_are_one_wherever_a_read_ends(monkeypatch):
    parts = [gzip.compress(bytes([k]) * 100) for k in range(3)]
    content = b"".join(parts)
    for chunk in range(1, len(content) + 1):
        monkeypatch.setattr("raycifar.data.trees.CHUNK", chunk)
        assert io.BufferedReader(Gunzipped(io.BytesIO(content))).read() == gzip.decompress(content)
    assert io.BufferedReader(Gunzipped(io.BytesIO(content + b"\0\0padding"))).read() == gzip.decompress(content)
