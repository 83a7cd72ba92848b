"""The blocks that both networks are built of; what they do together is in test_models.py."""

import pytest
import torch
from conftest import texture

from blocks import ChangeGains, GainMap, GatedBlock, dct_response, luma
from blur.spectrum import power, windowed_fft


def test_small_gains_differ_from_place_to_place_as_much_as_large_ones():
    gain_map = GainMap(4)
    torch.nn.init.normal_(gain_map.tail.weight, std=30.0)
    cells, film, expected_energies = torch.rand(1, 19, 5, 5), torch.zeros(1, 64), torch.zeros(1, 2, 16)
    gains = []
    for bias in -2.0, -8.0:
        torch.nn.init.constant_(gain_map.tail.bias, bias)
        gains.append(gain_map.predict_gains(cells, film, expected_energies).log())
    assert gains[0].std((2, 3)).min() > 0.1
    torch.testing.assert_close(gains[0] - gains[1], torch.full_like(gains[0], 6.0))


def test_the_energies_of_a_gain_map_follow_from_the_spectrum():
    noise = texture(1024, 1024).mean(1, keepdim=True) + 0.02 * torch.randn(1, 1, 1024, 1024)
    gain_map = GainMap(4)
    coefficients = torch.nn.functional.conv2d(torch.nn.functional.pixel_unshuffle(noise, 4), gain_map.basis[..., None, None])
    measured = gain_map.measure_cells(coefficients)[:, :16].mean((0, 2, 3))
    windows = noise.unfold(2, 64, 64).unfold(3, 64, 64).reshape(-1, 64, 64)
    spectrum = power(windowed_fft(windows)).mean(0).roll(32, 0)
    expected = torch.einsum("yx,kyx->k", spectrum, dct_response())
    torch.testing.assert_close(measured, expected, rtol=0.1, atol=0)


def test_a_gated_block_starts_as_the_identity_and_passes_a_gradient_to_all_of_its_weights():
    torch.manual_seed(0)
    block, x, film = GatedBlock(8), torch.randn(2, 8, 6, 6), (torch.zeros(2, 8, 1, 1), torch.zeros(2, 8, 1, 1))
    assert torch.equal(block(x, film), x)
    torch.nn.init.constant_(block.scale, 0.1)
    torch.nn.init.constant_(block.conv1.bias, -100.0)  # with a ReLU every unit would be dead
    block(x, film).square().mean().backward()
    assert all(parameter.grad.flatten(1).abs().amax(1).min() > 0 for parameter in block.parameters() if parameter.dim() > 1)


@pytest.mark.parametrize("width, near, far", [(1, 1.0, 1.0), (6, 1 / 6, 3 / 6)])
def test_the_differences_of_a_gain_map_tell_crisp_edges_from_soft_ones(width, near, far):
    ramp = ((torch.arange(64.0) - 24) / width).clamp(0, 1)
    for photo in ramp.expand(64, 64), ramp[:, None].expand(64, 64):
        blocks = torch.nn.functional.pixel_unshuffle(photo[None, None], 4)[..., ::2, :]
        cells = GainMap(4).measure_cells(torch.nn.functional.conv2d(blocks, GainMap(4).basis[..., None, None]))
        torch.testing.assert_close(cells[0, 17:, 1, 1], torch.tensor([near, far]))


def test_gains_keep_all_of_a_change_at_the_start_then_none_to_twice_of_its_luma_and_chroma():
    gains, film = ChangeGains(8), (torch.zeros(2, 24, 1, 1), torch.zeros(2, 24, 1, 1))
    features, photo, change = torch.randn(2, 8, 11, 13), torch.rand(2, 3, 44, 52), torch.randn(2, 3, 44, 52)
    torch.testing.assert_close(gains(features, photo, change, film), change)
    with torch.no_grad():
        gains.tail.bias.copy_(torch.tensor([50.0, -50.0]))
    torch.testing.assert_close(gains(features, photo, change, film), 2 * luma(change).expand(-1, 3, -1, -1))


def test_gains_follow_what_is_in_a_cell_and_around_it():
    torch.manual_seed(0)
    gains, film = ChangeGains(8), (torch.zeros(1, 24, 1, 1), torch.zeros(1, 24, 1, 1))
    for parameter in gains.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features, photo, change = torch.randn(1, 8, 64, 64), torch.rand(1, 3, 256, 256), torch.ones(1, 3, 256, 256)
    before = gains(features, photo, change, film)
    features[..., 32, 32] += 5.0  # pixels 128 to 131, in the cell from 128 to 143
    moved = (gains(features, photo, change, film) - before).abs().amax((0, 1, 2)).nonzero()
    assert moved.min() < 128 and moved.max() > 143
    assert moved.min() >= 131 - gains.RADIUS and moved.max() <= 128 + gains.RADIUS
