"""Images from nothing: the spectrum of pictures, the moments that batch norms remember, and enough for a refit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hf_zipit import draw_images, merge
from hf_zipit.data.drawn import IMAGES, noise
from hf_zipit.errors import DataError
from tests import tiny


def experts(name: str):
    return dict(zip(("a", "b"), tiny.pair(name), strict=True))


def mismatch(model, pixels):
    """The mean distance of what batch norms see from what they remember, in its own deviations."""
    off = []

    def note(norm, args):
        x = args[0].movedim(1, 0).flatten(1)
        off.append(float(((x.mean(1) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()).abs().mean()))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        model(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return sum(off) / len(off)


def test_amplitudes_fall_with_the_frequency_image_by_image():
    images = noise((400, 3, 32, 31), torch.Generator().manual_seed(0))
    assert float(images.square().mean()) == pytest.approx(1, abs=0.15)
    spectrum = torch.fft.rfft2(images).square().abs().mean(1)[:, 0].sqrt()
    low, high = spectrum[:, 1:3].mean(1), spectrum[:, 8:12].mean(1)
    assert (high < low).float().mean() > 0.95
    slopes = (low / high).log() / torch.log(torch.tensor(10 / 1.5))
    assert slopes.quantile(0.1) < 1.1 and slopes.quantile(0.9) > 1.9  # of photographs, and of bare shapes
    red, green = images[:, 0].flatten(), images[:, 1].flatten()
    assert 0.8 < float(torch.corrcoef(torch.stack([red, green]))[0, 1]) < 0.97


def test_every_task_has_its_own_and_the_same_again():
    drawn = draw_images(experts("vit"), samples=5)
    assert [tuple(own[IMAGES].shape) for own in drawn.values()] == [(5, 3, 16, 16)] * 2
    assert not torch.equal(drawn["a"][IMAGES], drawn["b"][IMAGES])
    for task, own in draw_images(experts("vit"), samples=5).items():
        assert torch.equal(own[IMAGES], drawn[task][IMAGES])
    assert not torch.equal(draw_images(experts("vit"), samples=5, seed=1)["a"][IMAGES], drawn["a"][IMAGES])


def test_batch_norms_see_what_they_remember():
    models = experts("resnet-basic")
    for model in models.values():
        model.train()
        with torch.no_grad():
            for _ in range(30):
                model(pixel_values=2 + torch.randn(16, 3, 32, 32))
        model.eval()
    before = {name: tensor.clone() for name, tensor in models["a"].state_dict().items()}
    plain, drawn = (draw_images(models, samples=16, size=32, steps=steps)["a"][IMAGES] for steps in (0, 40))
    assert mismatch(models["a"], drawn) < 0.6 * mismatch(models["a"], plain)
    assert all(torch.equal(before[name], tensor) for name, tensor in models["a"].state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in models["a"].parameters()) and not drawn.requires_grad


def test_a_merge_reads_them():
    models = experts("vit")
    merged = merge(models, draw_images(models, samples=16))
    assert merged.config.tasks == ["a", "b"] and merged.config.method["refit"] is not None


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("bert", {}, "'a' .* not images alone; give calibration data"),
        ("resnet-basic", {}, "does not say how large its images are; give size="),
        ("vit", {"samples": 0}, "samples is 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(name, settings, said):
    with pytest.raises(DataError, match=said):
        draw_images(experts(name), **settings)
