"""2,000 broken files of each kind: one line that names the file, or the images that were in it before."""

import gzip
import io
import random
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from mutations import damage, obstacles
from PIL import Image

from gankern.data import DataError, load

MUTATIONS = 2000
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 6, 8), np.uint8)
IDX = struct.pack(">BBBB3I", 0, 0, 8, 3, *PIXELS.shape) + PIXELS.tobytes()


def npz(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def picture(form, **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(file, form, **options)
    return file.getvalue()


def read(path, **options):
    """What is loaded, or the one line with which it is refused."""
    try:
        return load(path, **({"image_size": 8} | options)), None
    except DataError as error:
        text = str(error)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 500, text
        return None, text


@pytest.mark.parametrize(
    ("name", "content", "checked"),
    [
        ("set.npz", npz(images=PIXELS), True),
        ("set.npz", npz(np.savez_compressed, images=PIXELS, labels=np.arange(3)), True),
        ("images.gz", gzip.compress(IDX), True),
        ("images", IDX, False),
        ("folder/a.png", picture("PNG"), True),
        ("folder/a.jpg", picture("JPEG"), False),
    ],
)
def test_bytes(tmp_path, name, content, checked):
    """Where the format has checksums, no changed pixel is taken for a sound one."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    spec = path.parent if "/" in name else path
    before, _ = read(spec)
    assert before is not None
    refused = 0
    for seed in range(MUTATIONS if checked else MUTATIONS // 4):
        path.write_bytes(damage(content, random.Random(seed)))
        images, text = read(spec)
        refused += text is not None
        if text is not None:
            assert str(path) in text
        elif checked:
            assert torch.equal(images, before)
        else:
            assert images.shape[1:] == before.shape[1:] and torch.isfinite(images).all()
    assert refused > (MUTATIONS / 2 if checked else 0)


def header(descr, shape, version=(1, 0)):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text


def archive(*records, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in records:
            made.writestr(name, content)
    return file.getvalue()


def encrypted():
    content = bytearray(npz(images=PIXELS))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    return bytes(content)


HOSTILE = {
    "objects": (npz(images=np.array([{}], object)), "images: expected numbers, found Python objects"),
    "encrypted": (encrypted(), "images: expected an archive without a password, found an encrypted one"),
    "claims a shape": (
        archive(("images.npy", header("|u1", (2**40, 2**10, 2**10)) + b"x")),
        r"images: expected 1152921504606846976 bytes for shape .* found 1",
    ),
    "negative shape": (archive(("images.npy", header("|u1", (-1, -2, 3)) + b"123456")), "images"),
    "no numbers": (archive(("images.npy", header("<U3", (1, 2, 2)) + b"x" * 48)), "found dtype <U3"),
    "records": (archive(("images.npy", header([("a", "<i4")], (1, 2, 2)) + b"x" * 16)), "found dtype"),
    "other version": (archive(("images.npy", header("|u1", (1, 2, 2), (9, 0)) + b"1234")), "found 9.0"),
    "no header": (archive(("images.npy", b"text")), "expected a .npz archive of numbers, found: "),
    "deep header": (archive(("images.npy", header("|u1", (1,)).replace(b"(1,)", b"(" * 3000))), "images"),
    "other array": (archive(("a.npy", b""), ("b.npy", b"")), "found a, b"),
    "too long": (archive(("images.npy", header("|u1", (1, 2, 2)) + b"12345")), "expected 4 bytes .* found 5"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match=rf"set\.npz: .*{message}"):
        load(tmp_path / "set.npz")


def test_no_array_larger_than_the_memory_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gankern.data.memory.available_memory", lambda: 10**6)
    path = tmp_path / "set.npz"
    zeros = header("|u1", (2000, 32, 32)) + bytes(2000 * 32 * 32)
    path.write_bytes(archive(("images.npy", zeros), compression=zipfile.ZIP_DEFLATED))
    text = read(path)[1]
    assert text == f"{path}: images: expected an array that fits in memory, found 0.002048 GB, " + (
        "where 0.001 GB of memory are free"
    )
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 2000, 32, 32) + bytes(2000 * 32 * 32)))
    assert "expected images that fit in memory, found 0.002048 GB" in read(path)[1]


def test_image_size_beyond_the_memory(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(IDX)
    assert (
        "expected images that fit in memory, found 3, which need 5.534e+10 GB" in read(path, image_size=2**40 // 512)[1]
    )


def test_a_gzip_file_that_cannot_hold_what_it_claims(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3)))
    assert "found a file that cannot hold them" in read(path)[1]


def test_an_image_that_claims_to_be_huge(tmp_path):
    size = struct.pack(">II", 2**30, 2**30)
    chunk = b"IHDR" + size + b"\x08\x00\x00\x00\x00"
    content = picture("PNG")
    path = tmp_path / "a.png"
    path.write_bytes(content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:])
    text = read(tmp_path)[1]
    assert str(path) in text and "exceeds limit" in text


@pytest.mark.parametrize("name", ["images", "set.npz"])
def test_what_is_no_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(IDX)
    for found in obstacles(path):
        text = read(path)[1]
        assert ("found no files" if found == "folder" else found) in text


def test_links_in_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(picture("PNG"))
    (tmp_path / "b").symlink_to(".")
    (tmp_path / "a" / "2.png").symlink_to("1.png")
    assert read(tmp_path)[0].shape == (2, 1, 8, 8)
    (tmp_path / "3.png").symlink_to("3.png")
    assert f"{tmp_path / '3.png'}: expected an image, found: Too many levels" in read(tmp_path)[1]
    (tmp_path / "3.png").unlink()
    (tmp_path / "3.png").symlink_to("gone.png")
    assert f"{tmp_path / '3.png'}: expected an image, found nothing" in read(tmp_path)[1]


@pytest.mark.parametrize("spec", ["", "a\0b"])
def test_what_is_no_path(spec):
    with pytest.raises(ValueError, match=r"^(spec: expected 'digits' or a path, got ''|a b: expected .*null)"):
        load(spec)
