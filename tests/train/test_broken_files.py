"""2,000 broken files of each kind: one line that names file and field, or what was there before they broke."""

import copy
import json
import random
import re
import zipfile

import pytest
import torch
from mutations import damage, obstacles

from gankern import data, models, train
from gankern.train.checkpoint import _COMMENT, build, load_checkpoint, restore
from gankern.train.errors import CheckpointError
from gankern.train.history import read_csv
from gankern.train.run import load_config

MUTATIONS = 2000
SMALL = {"image_size": 8, "width": 1, "latent_dim": 2, "batch_size": 2, "n_critic": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps, and a model and batches to restore it into."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    train.fit(models.build("dcgan", **SMALL), images, steps=3, out=folder, progress=False)
    return folder, models.build("dcgan", **SMALL), data.batches(images, 2)


@pytest.fixture
def run(made, tmp_path):
    for name in ("checkpoint.pt", "config.json", "losses.csv"):
        (tmp_path / name).write_bytes((made[0] / name).read_bytes())
    return tmp_path


def message(call, path):
    """The one line with which `call` refuses a file; None if it takes it."""
    try:
        call()
    except CheckpointError as error:
        text = str(error)
        assert f"{path}" in text and "\n" not in text and len(text) < 400, text
        return text
    return None


def leaves(value, where=()):
    """Path and value of every entry of a nested state, containers included."""
    yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from leaves(item, (*where, key))


def same(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    return a.keys() == b.keys() and all(
        torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else isinstance(value, dict) or value == b[key]
        for key, value in a.items()
    )


def test_bytes_of_a_checkpoint(made, run):
    _, gan, batches = made
    path = run / "checkpoint.pt"
    content, before = path.read_bytes(), load_checkpoint(run)
    refused = 0
    for seed in range(MUTATIONS):
        path.write_bytes(damage(content, random.Random(seed)))

        def read():
            state = load_checkpoint(run)
            restore(state, gan, batches, run)
            build(state, run)
            return state

        if message(read, path):
            refused += 1
        else:
            assert same(load_checkpoint(run), before)
    assert refused > 0.95 * MUTATIONS


def test_bytes_of_a_checkpoint_without_a_hash(run):
    """As older versions wrote it: the records' own checksums are compared."""
    path = run / "checkpoint.pt"
    before = load_checkpoint(run)
    content = bytearray(path.read_bytes())
    end = content.rindex(_COMMENT) - 2
    content[end:] = b"\0\0"
    path.write_bytes(content)
    assert same(load_checkpoint(run), before)
    refused = 0
    for seed in range(MUTATIONS // 4):
        path.write_bytes(damage(bytes(content), random.Random(seed)))
        if message(lambda: load_checkpoint(run), path):
            refused += 1
        else:
            assert same(load_checkpoint(run), before)
    assert refused > MUTATIONS / 8


def test_flipped_bits_of_weights_are_seen(run):
    path = run / "checkpoint.pt"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo("checkpoint/data/0" if "checkpoint/data/0" in archive.namelist() else "archive/data/0")
        weights = archive.read(record)
    at = content.index(weights)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert f"record {record.filename}: expected the bytes" in message(lambda: load_checkpoint(run), path)


OTHERS = [
    None,
    True,
    "text",
    -1,
    2**80,
    1.5,
    float("nan"),
    [],
    {},
    {"other": 1},
    torch.zeros(7, 5),
    torch.zeros(3, dtype=torch.int16),
    torch.zeros(1).expand(2**40),
    torch.zeros(1, dtype=torch.int64).expand(2**40),
    torch.zeros(4, dtype=torch.int64).to_sparse(),
    torch.zeros(2, 2).to_sparse(),
]
#: Dictionaries whose entries are not always there: what is missing in them means something.
OPEN = {(), ("stateless",), *((("gan", f"{name}_optimizer", "state")) for name in ("generator", "critic"))}


def is_like(value, other):
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and (value.shape, value.dtype) == (other.shape, other.dtype)
    if value is None or isinstance(value, bool):
        return other is None or isinstance(other, bool)
    number = int | float
    if isinstance(value, number) and isinstance(other, number):
        return not isinstance(other, bool)
    return type(value) is type(other)


def test_entries_of_a_checkpoint(made, run):
    """Other types, other shapes, missing and additional keys, each saved as a sound file."""
    _, gan, batches = made
    path = run / "checkpoint.pt"
    original = load_checkpoint(run)
    places = [where for where, _ in leaves(original) if where and where[0] != "stateless" and where != ("losses",)]
    rng = random.Random(0)
    done = 0
    while done < MUTATIONS:
        state = copy.deepcopy(original)
        *parents, key = where = rng.choice(places)
        holder = state
        for parent in parents:
            holder = holder[parent]
        value = holder[key]
        kind = rng.choice(("other", "other", "missing", "more"))
        if kind == "more":
            holder, where = (value, where) if isinstance(value, dict) else (holder, tuple(parents))
            if not isinstance(holder, dict):
                continue
            holder["alien"] = 3.5
            field = ".".join((*map(str, where), "'alien'")) if where[:1] != ("config",) else "alien"
        elif kind == "missing":
            is_switch = "param_groups" in where and (value is None or isinstance(value, bool))
            if not isinstance(holder, dict) or is_switch or (parents and parents[0] == "config"):
                continue
            del holder[key]
            field = ".".join(map(str, where))
        else:
            other = rng.choice(OTHERS)
            if is_like(value, other) or where[0] == "config" or (isinstance(value, dict) and isinstance(other, dict)):
                continue
            if isinstance(holder, tuple):
                continue
            holder[key] = other
            field = ".".join(map(str, where))
        done += 1
        torch.save(state, path)
        text = message(lambda: restore(load_checkpoint(run), gan, batches, run), path)
        assert text is not None, (where, kind)
        assert field in text, (field, text)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("width", 2**40, "too large|expected shape|overflow|allocate memory"),
        ("width", "4", "width: expected a positive integer, got '4'"),
        ("width", 2, r"gan\.generator\.0\.weight: expected shape \(2, 2, 4, 4\) float32, found shape \(2, 1, 4, 4\)"),
        ("model", "vae", "name: expected one of dcgan"),
        ("model", [], "unhashable"),
        ("width", torch.zeros(3), r"config\.width: expected a plain setting, found shape \(3,\) float32"),
        ("alien", 1, "unexpected keyword argument 'alien'"),
    ],
)
def test_settings_in_a_checkpoint(run, name, value, found):
    path = run / "checkpoint.pt"
    state = load_checkpoint(run)
    state["config"][name] = value
    torch.save(state, path)
    assert re.search(found, message(lambda: build(load_checkpoint(run), run), path))


def test_a_record_that_claims_to_be_huge(run):
    path = run / "checkpoint.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    assert "found more claimed" in message(lambda: load_checkpoint(run), path)


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json", "losses.csv"])
def test_what_is_no_file(run, name):
    path = run / name
    read = {
        "checkpoint.pt": lambda: load_checkpoint(run),
        "config.json": lambda: load_config(run),
        "losses.csv": lambda: read_csv(path, 3),
    }
    for found in obstacles(path):
        assert found in message(read[name], path)


def test_config(run):
    path = run / "config.json"
    content, before = path.read_bytes(), load_config(run)
    entries = [*before, *OTHERS[:8], [[]] * 9]
    refused = 0
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        field = None
        if rng.random() < 0.5:
            path.write_bytes(damage(content, rng))
        else:
            config = copy.deepcopy(before)
            field = rng.choice(list(config))
            if rng.random() < 0.3:
                del config[field]
            else:
                config[field] = rng.choice([other for other in entries if type(other) is not type(config[field])])
            path.write_text(json.dumps(config))
        text = message(lambda: load_config(run), path)
        refused += text is not None
        if field is not None:
            assert text is not None and f": {field}: expected" in text
        elif text is None:
            config = load_config(run)
            assert isinstance(config["model"], dict) and isinstance(config["seed"], int)
    assert refused > 0.8 * MUTATIONS


def test_config_that_is_deep(run):
    (run / "config.json").write_text("[" * 100_000)
    assert "expected JSON" in message(lambda: load_config(run), run / "config.json")


def test_losses(run):
    path = run / "losses.csv"
    content, checksum = path.read_bytes(), load_checkpoint(run)["losses"]
    before = read_csv(path, 3, checksum)
    lines = content.decode().splitlines()
    refused = 0
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        if rng.random() < 0.5:
            path.write_bytes(damage(content, rng))
        else:
            broken = list(lines)
            at = rng.randrange(len(broken))
            values = broken[at].split(",")
            column = rng.randrange(len(values))
            kind = rng.randrange(5)
            if kind == 0:
                del values[column]
            elif kind == 1:
                values.insert(column, "0")
            elif kind == 2:
                values[column] = rng.choice(("", "x", "\0", "0x1", '"', "9" * 200_000, "-1", "1e999", "1.5.2"))
            broken[at] = ",".join(values)
            if kind == 3:
                del broken[at]
            elif kind == 4:
                broken.insert(at, broken[at])
            path.write_text("\r\n".join(broken) + "\r\n", newline="")
        text = message(lambda: read_csv(path, 3, checksum), path)
        if text is None:
            assert read_csv(path, 3, checksum) == before
        else:
            refused += 1
            assert re.search(r"line \d+:|step: expected 3|found other numbers", text)
    assert refused > 0.8 * MUTATIONS


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("2,0.5", "line 3: expected 4 values, step,critic_loss,generator_loss,images_per_second, found 2"),
        ("2,x,0.5,1.0", "line 3: critic_loss: expected a number, found 'x'"),
        ("7,0.5,0.5,1.0", "line 3: step: expected 2, found '7'"),
        ("2,0.5,\0,1.0", r"line 3: .*(generator_loss: expected a number, found '\\x00'|NUL)"),
    ],
)
def test_a_row_of_losses(run, row, found):
    path = run / "losses.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], row, *lines[3:]]))
    assert re.search(found, message(lambda: read_csv(path, 3), path))


def test_losses_without_an_end(run):
    path = run / "losses.csv"
    with path.open("r+b") as file:
        file.truncate(2**40)  # a sparse file
    with path.open("rb") as file:
        assert file.read(4) == b"step"
    assert read_csv(path, 3) is not None
    with path.open("r+b") as file:
        file.write(b"\0" * 4)
    assert "line 1: expected the header" in message(lambda: read_csv(path, 3), path)


def test_what_was_logged_after_the_checkpoint_may_be_broken(run):
    path = run / "losses.csv"
    before = read_csv(path, 3)
    with path.open("a") as file:
        file.write("4,0.")
    assert read_csv(path, 3) == before
