import copy

import pytest
import torch
from torch import nn

from gankern import models
from gankern.models.wgan_gp import stock_gradient_penalty
from gankern.train import critic_step, generator_step

NAMES = sorted(models.MODELS)
SMALL = {"image_size": 16, "width": 8, "latent_dim": 16, "batch_size": 8}


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine, threads wait for each other far longer than they compute at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(name, ops, seed=0, **overrides):
    torch.manual_seed(seed)
    return models.build(name, ops=ops, **(SMALL | overrides))


def first_steps(gan, steps=3):
    """Losses of the first steps, from one seed and on the same images."""
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        for _ in range(gan.n_critic):
            real = torch.rand(gan.batch_size, gan.channels, gan.image_size, gan.image_size) * 2 - 1
            losses.append(critic_step(gan, real, gan.sample_latent(gan.batch_size)))
        losses.append(generator_step(gan, gan.sample_latent(gan.batch_size)))
    return torch.stack(losses)


@pytest.mark.parametrize("name", NAMES)
def test_stock_and_gankern_begin_with_equal_states(name):
    stock, ours = build(name, "stock"), build(name, "gankern")
    for network in ("generator", "critic"):
        expected, actual = stock.state_dict()[network], ours.state_dict()[network]
        assert list(actual) == list(expected)
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_stock_and_gankern_agree_over_the_first_steps(name, float64):
    stock, ours = build(name, "stock"), build(name, "gankern")
    torch.testing.assert_close(first_steps(ours), first_steps(stock), rtol=1e-7, atol=1e-9)
    for network in ("generator", "critic"):
        expected, actual = stock.state_dict()[network], ours.state_dict()[network]
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-6, atol=1e-8, msg=f"{network}.{key}")


@pytest.mark.parametrize("name", NAMES)
def test_stock_and_gankern_agree_in_float32(name):
    torch.testing.assert_close(
        first_steps(build(name, "gankern")), first_steps(build(name, "stock")), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_gankern_loads_the_state_of_stock(name):
    stock, ours = build(name, "stock"), build(name, "gankern", seed=5)
    ours.generator.load_state_dict(stock.generator.state_dict())
    latent = stock.sample_latent(4)
    stock.generator.eval(), ours.generator.eval()
    torch.testing.assert_close(ours.generator(latent), stock.generator(latent), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("image_size", "channels"), [(8, 1), (16, 3), (32, 1), (64, 3)])
def test_shapes(name, image_size, channels):
    gan = build(name, "gankern", image_size=image_size, channels=channels, width=4)
    images = gan.generator(gan.sample_latent(3))
    assert images.shape == (3, channels, image_size, image_size)
    assert images.abs().max() <= 1
    assert gan.critic(images).shape == (3,)


def test_published_settings():
    dcgan, wgan, wgan_gp = (models.build(name, width=4) for name in ("dcgan", "wgan", "wgan-gp"))
    assert (dcgan.batch_size, dcgan.n_critic, dcgan.latent_dim) == (128, 1, 100)
    assert (wgan.batch_size, wgan.n_critic, wgan.clip) == (64, 5, 0.01)
    assert (wgan_gp.batch_size, wgan_gp.n_critic, wgan_gp.penalty_weight) == (64, 5, 10.0)
    for gan, lr, betas in ((dcgan, 2e-4, (0.5, 0.999)), (wgan_gp, 1e-4, (0.0, 0.9))):
        for optimizer in (gan.generator_optimizer, gan.critic_optimizer):
            assert isinstance(optimizer, torch.optim.Adam)
            assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (lr, betas)
    assert wgan.critic_optimizer.defaults["lr"] == wgan.generator_optimizer.defaults["lr"] == 5e-5


def test_dcgan_guidelines():
    gan = models.build("dcgan", ops="stock", width=4)
    kinds = [type(layer) for layer in gan.generator]
    assert kinds == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU] * 3 + [nn.ConvTranspose2d, nn.Tanh]
    kinds = [type(layer) for layer in gan.critic]
    block = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, *block, *block, nn.Conv2d, nn.Flatten]
    latent = gan.sample_latent(100)
    assert latent.shape == (100, 100, 1, 1)
    assert -1 <= latent.min() < -0.9 < 0.9 < latent.max() <= 1
    weights = torch.cat([layer.weight.flatten() for layer in gan.generator if isinstance(layer, nn.ConvTranspose2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_wgan_gp_critic_has_no_batch_norm():
    gan = models.build("wgan-gp", ops="stock", width=4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in gan.critic.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in gan.generator.modules())


@pytest.mark.parametrize("ops", ["gankern", "stock"])
def test_wgan_clips_the_critic_and_not_the_generator(ops):
    gan = build("wgan", ops)
    first_steps(gan, steps=1)
    assert all(parameter.abs().max() <= 0.01 for parameter in gan.critic.parameters())
    assert any(parameter.abs().max() > 0.01 for parameter in gan.generator.parameters())


def test_stock_penalty_of_a_linear_critic():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False), nn.Flatten(0))
    real, fake = torch.randn(2, 5, 3, 2, 2).unbind()
    penalty = stock_gradient_penalty(critic, real, fake, weight=10.0, alpha=torch.rand(5, 1, 1, 1))
    torch.testing.assert_close(penalty, 10 * (critic[1].weight.norm() - 1) ** 2)


def test_losses():
    real, fake = torch.zeros(2, 1, 16, 16), torch.ones(2, 1, 16, 16)
    scores = nn.Sequential(nn.Flatten(), nn.Linear(256, 1), nn.Flatten(0))
    nn.init.constant_(scores[1].weight, 2 / 256), nn.init.constant_(scores[1].bias, -0.5)  # D(real) -0.5, D(fake) 1.5
    softplus = nn.functional.softplus
    for name, critic_loss, generator_loss in (
        ("dcgan", softplus(torch.tensor(0.5)) + softplus(torch.tensor(1.5)), softplus(torch.tensor(-1.5))),
        ("wgan", torch.tensor(2.0), torch.tensor(-1.5)),
        ("wgan-gp", 2 + 10 * (scores[1].weight.norm() - 1) ** 2, torch.tensor(-1.5)),
    ):
        gan = build(name, "gankern")
        gan.critic = scores
        torch.testing.assert_close(gan.critic_loss(real, fake), critic_loss)
        torch.testing.assert_close(gan.generator_loss(fake), generator_loss)


def test_generator_step_leaves_the_critic_alone():
    gan = build("dcgan", "gankern")
    before = [parameter.clone() for parameter in gan.critic.parameters()]
    generator_step(gan, gan.sample_latent(4))
    for parameter, old in zip(gan.critic.parameters(), before, strict=True):
        assert parameter.grad is None and parameter.requires_grad
        assert torch.equal(parameter, old)


def test_critic_step_leaves_the_generator_alone():
    gan = build("wgan-gp", "gankern")
    before = [parameter.clone() for parameter in gan.generator.parameters()]
    loss = critic_step(gan, torch.zeros(4, 1, 16, 16), gan.sample_latent(4))
    assert loss.shape == () and not loss.requires_grad
    for parameter, old in zip(gan.generator.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_the_same_model(name):
    gan = build(name, "stock", channels=3, lr=1e-3)
    assert models.from_config(gan.config).config == gan.config


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ops", ["gankern", "stock"])
def test_state_dict_restores_networks_and_optimizers(name, ops):
    gan, other = build(name, ops), build(name, ops, seed=9)
    first_steps(gan, steps=1)
    other.load_state_dict(copy.deepcopy(gan.state_dict()))
    assert torch.equal(first_steps(other), first_steps(gan))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name", "vae"),
        ("ops", "fast"),
        ("image_size", 4),
        ("image_size", 30),
        ("image_size", 32.0),
        ("channels", 0),
        ("width", -1),
        ("latent_dim", True),
        ("batch_size", 0),
        ("n_critic", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("clip", -0.01),
        ("penalty_weight", float("inf")),
    ],
)
def test_bad_argument(argument, value):
    name = {"clip": "wgan", "penalty_weight": "wgan-gp"}.get(argument, "dcgan")
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got {value!r}$"):
        models.build(**({"name": name} | {argument: value}))
