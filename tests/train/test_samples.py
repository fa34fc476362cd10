import pytest
import torch
from PIL import Image

from gankern import models, train


@pytest.fixture
def gan():
    torch.manual_seed(0)
    return models.build("dcgan", image_size=8, width=4, latent_dim=4, batch_size=4)


def test_sample_depends_on_the_seed_alone(gan):
    state = {key: value.clone() for key, value in gan.generator.state_dict().items()}
    images = train.sample(gan, 6, seed=1)
    assert images.shape == (6, 1, 8, 8) and not images.requires_grad
    assert torch.equal(train.sample(gan, 6, seed=1), images)
    assert not torch.equal(train.sample(gan, 6, seed=2), images)
    assert gan.generator.training
    assert all(torch.equal(value, state[key]) for key, value in gan.generator.state_dict().items())


def test_grid_places_images_row_by_row(tmp_path):
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    train.save_grid(images, tmp_path / "new" / "grid.png", columns=2, gap=1)
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.size == (2 * 3 + 1, 3 * 2 + 2)
        assert [grid.getpixel((x, y)) for y in (0, 3, 6) for x in (0, 4)] == [0, 64, 128, 191, 255, 0]
        assert grid.getpixel((3, 6)) == 0


def test_grid_of_colour_images(tmp_path):
    images = torch.tensor([1.0, -1.0, 5.0]).reshape(1, 3, 1, 1).expand(3, 3, 4, 4)
    train.save_grid(images, tmp_path / "grid.png", gap=0)
    with Image.open(tmp_path / "grid.png") as grid:
        assert (grid.mode, grid.size) == ("RGB", (8, 8))
        assert grid.getpixel((0, 0)) == (255, 0, 255)
        assert grid.getpixel((7, 7)) == (0, 0, 0)


def test_grid_needs_one_or_three_channels(tmp_path):
    with pytest.raises(ValueError, match=r"^images: expected 1 or 3 channels, got 2$"):
        train.save_grid(torch.zeros(1, 2, 4, 4), tmp_path / "grid.png")
