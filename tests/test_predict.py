"""Asking a trained network: images of every kind, broken ones among them."""

import io
import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from command import Predict, finish
from PIL import Image
from pyarrow import fs

from raycifar.data import CIFAR100
from raycifar.data.pictures import decode, find_images, read_image
from raycifar.errors import RequestError
from raycifar.models import Architecture
from raycifar.storage.weights import to_file
from raycifar.workflows.prediction import read_images

LOCAL = fs.LocalFileSystem()


@pytest.fixture
def photo():
    """A red top and a blue bottom, 64×64."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :, 0], pixels[32:, :, 2] = 255, 255
    return Image.fromarray(pixels)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "run/model.safetensors"
    path.parent.mkdir()
    path.write_bytes(to_file(Architecture("cnn").build().state_dict(), Architecture("cnn")))
    return path


def predict(*args, code=0):
    return finish(Predict(*args, storage=None, env={"COLUMNS": "400"}), code)


def test_the_names_are_the_data_set_s(cifar):
    import tarfile

    with tarfile.open(cifar) as archive:
        files = {"fine_label_names.txt": CIFAR100.class_names, "coarse_label_names.txt": CIFAR100.superclass_names}
        for file, names in files.items():
            member = next(m for m in archive.getmembers() if m.name.endswith(file))
            assert tuple(archive.extractfile(member).read().decode().split()) == names


def test_a_cifar_image_comes_back_pixel_by_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(LOCAL, str(tmp_path / "a.png")), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "YCbCr", "I;16"])
def test_images_of_every_mode_are_read(tmp_path, photo, mode):
    image = photo.convert("L").convert(mode) if mode in ("1", "I;16") else photo.convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr", "I;16") else "a.png")
    image.save(path)
    pixels = read_image(LOCAL, str(path))
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), np.uint8)
    if mode in ("L", "LA", "I;16"):
        assert np.array_equal(pixels[0], pixels[2])
        assert abs(int(pixels[0, 4, 4]) - 76) <= 1  # the luma of red
    elif mode != "1":
        assert pixels[0, 4, 4] > 200 > 60 > pixels[2, 4, 4]


def test_transparency_is_white_and_exif_turns(tmp_path, photo):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(LOCAL, str(tmp_path / "clear.png")) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = read_image(LOCAL, str(tmp_path / "turned.jpg"))
    assert turned[2, 4, 16] > 200 > 60 > turned[0, 4, 16]


GRAY = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
EXIF_OF_A_CAMERA = (  # of a picture that is upside down: its resolution is -1/0, for "not known"
    b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x011A, 10, 1, 38)
    + struct.pack("<HHII", 0x0112, 3, 1, 3) + b"\0\0\0\0" + struct.pack("<ii", -1, 0)
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "pixels", "exif"),
    [
        ("16-bit.png", GRAY.astype(np.uint16) * 257, b""),
        ("8-in-32-bit.tif", GRAY.astype(np.int32), b""),
        ("16-in-32-bit.tif", GRAY.astype(np.int32) * 257, b""),
        ("0-to-1.tif", GRAY.astype(np.float32) / 255, b""),
        ("camera.jpg", np.rot90(GRAY, 2), EXIF_OF_A_CAMERA),
        ("garbled-exif.jpg", GRAY, b"Exif\0\0II*\0\xff\xff\xff\xff garbled"),
    ],
)
def test_pictures_of_one_scene_are_read_alike(tmp_path, name, pixels, exif):
    Image.fromarray(pixels).save(tmp_path / name, **({"exif": exif, "quality": 95} if exif else {}))
    Image.fromarray(GRAY).save(tmp_path / "plain.png")
    read, plain = (read_image(LOCAL, str(tmp_path / file)).astype(int) for file in (name, "plain.png"))
    assert np.abs(read - plain).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (GRAY.astype(np.int32) * 2**23, r"range from 0 to 2.139e\+09, and which is white isn't known"),
        (GRAY.astype(np.int32) - 1, "range from -1 to 254"),
        (GRAY.astype(np.float32), "range from 0 to 255"),
        (np.full((9, 9), np.nan, np.float32), "range from nan to nan"),
    ],
)
def test_numbers_of_an_unknown_range_are_not_guessed_at(tmp_path, pixels, said):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=said):
        read_image(LOCAL, str(tmp_path / "a.tif"))
    with pytest.raises(RequestError, match=said):
        read_images(Image.fromarray(pixels))


def test_no_program_is_started_to_open_a_picture(tmp_path, photo):
    photo.save(tmp_path / "photo.jpg", "EPS")
    with pytest.raises(ValueError, match="not an image of a known format"):
        read_image(LOCAL, str(tmp_path / "photo.jpg"))


def test_a_picture_of_a_given_size_is_looked_at_before_it_is_decoded(tmp_path):
    content = io.BytesIO()
    Image.new("1", (9000, 9000)).save(content, "png")
    with pytest.raises(ValueError, match=r"^it has 9000×9000 pixels, not 32×32$"):
        decode(content.getvalue(), (32, 32))
    broken = content.getvalue()[:-40]
    with pytest.raises(ValueError, match="9000×9000"):
        decode(broken, (32, 32))


def test_only_the_images_of_a_folder_are_found(tmp_path, photo):
    for name in ("a.png", "b", ".hidden.png", ".hidden/c.png", "more/d.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo.save(tmp_path / name, "png")
    (tmp_path / "more/again").symlink_to(tmp_path)
    (tmp_path / "e.jpg").write_text("claims to be an image")
    for name in ("notes.txt", "LICENSE", "data.bin"):
        (tmp_path / name).write_text("no image, and not named as one")
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "fifo.png")
    found, others = find_images(str(tmp_path))
    assert [file.name.removeprefix(f"{tmp_path}/") for file in found] == ["a.png", "b", "e.jpg", "more/d.webp"]
    assert others == 3
    with pytest.raises(OSError, match="not a file"):
        read_image(LOCAL, str(tmp_path / "fifo.png"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/notes.txt").write_text("")
    with pytest.raises(RequestError, match="texts holds no images, but 1 other file"):
        find_images(str(tmp_path / "texts"))


def test_a_wide_image_is_cut_to_its_middle(tmp_path, photo):
    wide = Image.new("RGB", (300, 64), "lime")
    wide.paste(photo, (118, 0))
    wide.save(tmp_path / "wide.png")
    assert read_image(LOCAL, str(tmp_path / "wide.png"))[1].max() < 60


def test_a_folder_of_mixed_and_broken_files(tmp_path, weights, photo):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    photo.save(folder / "a.png")
    photo.convert("CMYK").save(folder / "more/b.jpg")
    stream = io.BytesIO()
    photo.resize((500, 500)).save(stream, "JPEG")
    (folder / "cut.jpg").write_bytes(stream.getvalue()[:2000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("passed over")
    photo.save(folder / "[red]c:smile:\x1b[31m.png")
    (folder / os.fsdecode(b"\xff[")).mkdir()
    (folder / os.fsdecode(b"\xff[/red].png")).write_bytes(b"no image")
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0) + b"\0" * 4
    (folder / "bomb.png").write_bytes(huge)
    done = predict(weights.parent, folder, "--json", code=1)
    answers = {answer["image"]: answer for answer in json.loads(done.stdout)}
    assert list(answers) == sorted(str(path) for path in folder.rglob("*.*") if path.name != "notes.txt")
    good = [answer["top5"] for answer in answers.values() if "top5" in answer]
    assert len(good) == 3
    for top5 in good:
        assert len(top5) == 5
        assert {guess["class"] for guess in top5} <= set(CIFAR100.class_names)
        assert [g["probability"] for g in top5] == sorted((g["probability"] for g in top5), reverse=True)
    assert "5 of 8 images can't be read" in done.stderr
    for name in ("cut.jpg", "empty.png", "text.png", "bomb.png"):
        assert f"{name}: " in done.stderr
    assert answers[f"{folder}/empty.png"]["error"] == "the file is empty"
    assert "1 file skipped: not an image." in done.stderr
    table = predict(weights.parent, folder, code=1)
    assert r"/[red]c:smile:\x1b[31m.png" in table.stdout
    for said in (table.stdout, table.stderr):
        assert r"/\udcff[/red].png" in said
        assert "\x1b" not in said


@pytest.mark.parametrize(("top1", "chance"), [(0.012, True), (0.02, False)])
def test_answers_of_a_network_that_guesses_are_called_so(tmp_path, weights, photo, top1, chance):
    photo.save(tmp_path / "a.png")
    result = {"status": "finished", "test": {"images": 10_000, "loss": 4.6, "top1": top1, "top5": 0.05}}
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    said = predict(tmp_path / "run", tmp_path / "a.png", "--json").stderr
    assert ("is at the level of chance: it is right on 1.20% of its 10,000 test images" in said) == chance


def test_the_answer_is_the_network_s(tmp_path, weights, photo):
    photo.save(tmp_path / "a.png")
    table = predict(weights, tmp_path / "a.png").stdout
    (answer,) = json.loads(predict(weights, tmp_path / "a.png", "--json").stdout)
    torch.manual_seed(0)
    network = Architecture("cnn").build().eval()
    from raycifar.models.preprocess import preprocess

    with torch.inference_mode():
        expected = network(
            preprocess(torch.from_numpy(read_image(LOCAL, str(tmp_path / "a.png")).copy())[None])
        ).softmax(1)[0]
    assert [guess["class"] for guess in answer["top5"]] == [CIFAR100.class_names[i] for i in expected.topk(5).indices]
    assert [g["probability"] for g in answer["top5"]] == pytest.approx(expected.topk(5).values.tolist(), rel=1e-4)
    assert answer["top5"][0]["class"] in table


def test_what_is_no_network_is_refused_in_a_sentence(tmp_path, weights, photo):
    photo.save(tmp_path / "a.png")
    broken = tmp_path / "cut.safetensors"
    broken.write_bytes(weights.read_bytes()[:5000])
    assert "not a safetensors file, or is damaged" in predict(broken, tmp_path / "a.png", code=2).stderr
    assert "does not exist" in predict(tmp_path / "nothing", tmp_path / "a.png", code=2).stderr
    assert "nowhere.png does not exist" in predict(weights, tmp_path / "nowhere.png", code=2).stderr
    (tmp_path / "other.pth").write_bytes(b"")
    assert "other.pth is a file: give a finished" in predict(tmp_path / "other.pth", tmp_path / "a.png", code=2).stderr
    shutil.copytree(tmp_path / "run", tmp_path / "empty", ignore=lambda *_: ["model.safetensors"])
    assert "does not exist" in predict(tmp_path / "empty", tmp_path / "a.png", code=2).stderr


def test_a_storage_that_can_t_be_asked_is_named(monkeypatch):
    def refuse(filesystem, path):
        raise OSError("Could not resolve host")

    monkeypatch.setattr("raycifar.storage.files.file_type", refuse)
    with pytest.raises(RequestError, match=r"photos can't be read: Could not resolve host\."):
        find_images("photos")
