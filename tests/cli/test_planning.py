"""`fulmen plan`."""

import re


class TestPlan:
    def test_serving_on_a_machine_says_what_each_gpu_holds(self, fulmen):
        plan = ("plan", "minimax-text-01", "--dtype", "int8", "--devices", 8, "--max-context", 1_000_000)
        code, divided, _ = fulmen(*plan, "--memory", 80)
        assert (code, divided.splitlines()[0]) == (0, "8 x 80 GB, of which 90%; int8 weights")
        code, out, _ = fulmen(*plan, "--machine", "H800")
        assert (code, out[: len(divided)]) == (0, divided)
        assert re.search(r"on each H800 +tp 8, ep 8, etp 1\n +weights +57.4 GB", out)
        code, out, _ = fulmen(*plan, "--machine", "H800", "--memory", 96)
        assert (code, out.splitlines()[0]) == (0, "8 x 96 GB, of which 90%; int8 weights")

    def test_training(self, fulmen):
        plan = ("plan", "tiny-vl", "--train", "--machine", "H800", "--devices", 8, "--batch-tokens", 2**17)
        code, out, _ = fulmen(*plan, "--mesh", "pp=2,cp=2, ep=4")
        assert code == 0
        assert out.startswith("of the text model alone")
        for part in (
            r"mesh +pp 2 x dp 2 x cp 2 x tp 1\n",
            r"of experts +pp 2 x edp 1 x etp 1 x ep 4\n",
            "why this one",
        ):
            assert re.search(part, out), part
        code, out, _ = fulmen(*plan, "--mesh", "cp=8", "--memory", 0.01)
        assert (code, "does not fit: " in out) == (0, True)
