"""Names of devices."""

import pytest
import torch

from fulmen.config import UserError
from fulmen.model import choose_device, multiplies_bf16

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_a_device_by_name():
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("available", "name"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(monkeypatch, available, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch, "empty", lambda *args, device: None)
    assert choose_device("auto").type == name


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", pytest.param("cuda", marks=without_cuda)])
def test_a_device_that_cannot_be_used_is_one_line(name):
    with pytest.raises(UserError, match=f"^device '{name}' cannot be used here: .+$") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_bf16_of_the_cpu_is_what_its_instructions_say(monkeypatch):
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx512: value)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value)
        assert multiplies_bf16(torch.device("cpu")) == (avx512 or amx)
