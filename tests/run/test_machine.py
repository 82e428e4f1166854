"""What figures were measured on is told with them."""

import json
import platform

import torch

from fulmen.run import machine
from fulmen.run.machine import describe_machine


def test_the_machine_is_described(monkeypatch):
    described = describe_machine("pytest", "no-such-package")
    assert described["python"] == platform.python_version()
    assert described["torch"] == torch.__version__
    assert described["cores"] >= 1
    assert {"cpu", "numpy", "pytest", "time"} <= described.keys()
    assert "no-such-package" not in described
    json.dumps(described)
    # Outside of the package's own repository there is no commit to name.
    monkeypatch.setattr(machine, "_git", lambda *arguments: "")
    assert "commit" not in describe_machine()


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    assert describe_machine(device="cuda:1")["gpu"] == "GPU of cuda:1"
    assert "gpu" not in describe_machine()
