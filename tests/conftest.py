"""Shared by all tests: the same random numbers every time, no network."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels for a GPU then take tensors on the CPU, slowly; Triton asks once, when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors are tiny here: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Every tensor that is allocated without being filled is full of nan, so that an element left unwritten shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def gpu_device():
    """Where kernels for a GPU are tested: on one, else on the CPU under Triton's interpreter."""
    pytest.importorskip("triton", reason="the kernels need the triton package")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fulmen(capsys):
    """fulmen("info", "tiny") gives (exit code, standard output, standard error)."""
    # Here, so that the settings above come before whatever it imports.
    from fulmen.cli import main

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return (end.value.code or 0, *capsys.readouterr())

    return call
