"""The decay rates of section 3.6."""

import pytest
import torch

from fulmen.ops.lightning import decay_rates


def test_the_published_figures():
    rates = decay_rates(64, 0, 80)
    assert rates.shape == (64,)
    assert rates.dtype == torch.float32
    assert [round(rate, 3) for rate in rates[:2].tolist()] == [0.917, 0.841]
    assert round(rates[-1].item(), 4) == 0.0039


@pytest.mark.parametrize(("heads", "layer", "layers"), [(64, 78, 80), (12, 3, 16), (7, 0, 2), (1, 5, 6), (4, 0, 1)])
def test_the_plain_formula_for_any_number_of_heads(heads, layer, layers):
    expected = [2 ** (-8 * (h + 1) / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5) for h in range(heads)]
    torch.testing.assert_close(decay_rates(heads, layer, layers), torch.tensor(expected), rtol=1e-6, atol=0)


def test_every_head_of_every_layer_forgets_and_deeper_ones_more_slowly():
    rates = torch.stack([decay_rates(64, layer, 80) for layer in range(80)])
    assert (rates > 0).all()
    assert (rates.diff(dim=0) < 0).all()
    assert (rates.diff(dim=1) < 0).all()


def test_they_are_numbers_even_while_a_model_is_built_on_the_meta_device():
    with torch.device("meta"):
        assert decay_rates(4, 0, 8).device.type == "cpu"


@pytest.mark.parametrize("layer", [-1, 80])
def test_a_layer_that_the_model_does_not_have(layer):
    with pytest.raises(ValueError, match=rf"layer must lie in 0\.\.79 \(num_layers=80\), got {layer}"):
        decay_rates(64, layer, 80)
