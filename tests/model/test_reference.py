"""The whole text model once more: float64, one token at a time, from the published description and names alone.

Nothing of the reference comes from the package. Weights are drawn under the published names and reach the package as
the files that others would give it.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fulmen.checkpoint import load_model

EPS, LIGHTNING_EPS = 1e-5, 1e-6


def settings(plan):
    return SimpleNamespace(
        plan=plan, V=53, hidden=24, H=4, kv=2, D=16, rotary=8, theta=1000.0, E=5, k=2, F=16,
        lightning=(1.9, 0.9), softmax=(1.4, 1.2), mlp=(1.6, 0.8),
    )  # fmt: skip


def config_json(s):
    names = {"linear_attention": s.lightning, "full_attention": s.softmax, "mlp": s.mlp}
    alphas = {f"layernorm_{name}_alpha": pair[0] for name, pair in names.items()}
    betas = {f"layernorm_{name}_beta": pair[1] for name, pair in names.items()}
    return alphas | betas | {
        "model_type": "minimax_text_01", "architectures": ["MiniMaxText01ForCausalLM"], "vocab_size": s.V,
        "hidden_size": s.hidden, "num_hidden_layers": len(s.plan), "num_attention_heads": s.H, "head_dim": s.D,
        "num_key_value_heads": s.kv, "rotary_dim": s.rotary, "rope_theta": s.theta, "num_local_experts": s.E,
        "num_experts_per_tok": s.k, "intermediate_size": s.F, "max_position_embeddings": 1000, "rms_norm_eps": EPS,
        "hidden_act": "silu", "postnorm": True, "shared_intermediate_size": 0, "tie_word_embeddings": False,
        "attn_type_list": [int(kind == "S") for kind in s.plan],
    }  # fmt: skip


def draw(s):
    shapes = {"model.embed_tokens": (s.V, s.hidden), "model.norm": (s.hidden,), "lm_head": (s.V, s.hidden)}
    for number, kind in enumerate(s.plan):
        layer, inner = f"model.layers.{number}.", s.H * s.D
        shapes[layer + "input_layernorm"] = shapes[layer + "post_attention_layernorm"] = (s.hidden,)
        shapes[layer + "block_sparse_moe.gate"] = (s.E, s.hidden)
        for e in range(s.E):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            shapes |= {expert + "w1": (s.F, s.hidden), expert + "w2": (s.hidden, s.F), expert + "w3": (s.F, s.hidden)}
        attention = layer + "self_attn."
        if kind == "L":
            shapes |= {attention + "qkv_proj": (3 * inner, s.hidden), attention + "output_gate": (inner, s.hidden)}
            shapes |= {attention + "norm": (inner,), attention + "out_proj": (s.hidden, inner)}
        else:
            shapes |= {attention + "q_proj": (inner, s.hidden), attention + "o_proj": (s.hidden, inner)}
            shapes |= {attention + name: (s.kv * s.D, s.hidden) for name in ("k_proj", "v_proj")}
    return {
        f"{name}.weight": torch.rand(shape) + 0.5 if len(shape) == 1 else torch.randn(shape) / math.sqrt(shape[1])
        for name, shape in shapes.items()
    }


class Reference:
    """One sequence, token by token; `weights` under the published names."""

    def __init__(self, s, weights):
        self.s, self.w = s, {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
        self.states = [torch.zeros(s.H, s.D, s.D, dtype=torch.float64) for _ in s.plan]
        self.keys, self.values = [[] for _ in s.plan], [[] for _ in s.plan]

    def logits(self, tokens):
        return torch.stack([self.step(token, position) for position, token in enumerate(tokens)])

    def step(self, token, position):
        x = self.w["model.embed_tokens"][token]
        for number, kind in enumerate(self.s.plan):
            layer = f"model.layers.{number}."
            n1 = self.norm(x, layer + "input_layernorm")
            mixed = self.lightning(n1, number) if kind == "L" else self.softmax(n1, number, position)
            alpha, beta = self.s.lightning if kind == "L" else self.s.softmax
            n2 = self.norm(alpha * n1 + beta * mixed, layer + "post_attention_layernorm")
            alpha, beta = self.s.mlp
            x = alpha * n2 + beta * self.experts(n2, layer + "block_sparse_moe.")
        return self.w["lm_head"] @ self.norm(x, "model.norm")

    def norm(self, x, name, eps=EPS):
        return x / (x.square().mean() + eps).sqrt() * self.w[name]

    def lightning(self, x, number):
        s, name = self.s, f"model.layers.{number}.self_attn."
        packed = silu(self.w[name + "qkv_proj"] @ x).view(s.H, 3 * s.D)
        outputs = []
        for h in range(s.H):
            q, k, v = packed[h].split(s.D)
            rate = 2 ** (-8 * (h + 1) / s.H) * (1 - number / (len(s.plan) - 1 + 1e-5) + 1e-5)
            self.states[number][h] = math.exp(-rate) * self.states[number][h] + torch.outer(k, v)
            outputs.append(q @ self.states[number][h])
        y = self.norm(torch.cat(outputs), name + "norm", LIGHTNING_EPS)
        return self.w[name + "out_proj"] @ (y / (1 + (-(self.w[name + "output_gate"] @ x)).exp()))

    def softmax(self, x, number, position):
        s, name = self.s, f"model.layers.{number}.self_attn."
        q = (self.w[name + "q_proj"] @ x).view(s.H, s.D)
        k = (self.w[name + "k_proj"] @ x).view(s.kv, s.D)
        self.keys[number].append(torch.stack([self.rotate(head, position) for head in k]))
        self.values[number].append((self.w[name + "v_proj"] @ x).view(s.kv, s.D))
        keys, values = torch.stack(self.keys[number]), torch.stack(self.values[number])
        outputs = []
        for h in range(s.H):
            group = h // (s.H // s.kv)
            scores = keys[:, group] @ self.rotate(q[h], position) / math.sqrt(s.D)
            weights = (scores - scores.max()).exp()
            outputs.append(weights / weights.sum() @ values[:, group])
        return self.w[name + "o_proj"] @ torch.cat(outputs)

    def rotate(self, head, position):
        half, rotated = self.s.rotary // 2, head.clone()
        for i in range(half):
            angle = position * self.s.theta ** (-2 * i / self.s.rotary)
            a, b = head[i], head[i + half]
            rotated[i] = a * math.cos(angle) - b * math.sin(angle)
            rotated[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return rotated

    def experts(self, x, name):
        scores = (self.w[name + "gate"] @ x).exp()
        chosen = sorted(range(self.s.E), key=lambda e: -scores[e])[: self.s.k]
        out = torch.zeros_like(x)
        for e in chosen:
            w1, w2, w3 = (self.w[f"{name}experts.{e}.{matrix}"] for matrix in ("w1", "w2", "w3"))
            out += scores[e] / scores[chosen].sum() * (w2 @ (silu(w1 @ x) * (w3 @ x)))
        return out


def silu(x):
    return x / (1 + (-x).exp())


@pytest.mark.parametrize(("plan", "pieces"), [("LLSLS", [1, 120, 1, 1, 150]), ("SLL", [30])])
@torch.no_grad()
def test_logits_equal_the_reference(tmp_path, plan, pieces):
    s = settings(plan)
    weights = draw(s)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(s)))
    tokens = torch.randint(s.V, (sum(pieces),))
    expected = Reference(s, weights).logits(tokens)
    assert expected.std() > 0.3
    model = load_model(tmp_path)
    torch.testing.assert_close(model(tokens[None])[0].double(), expected, rtol=0, atol=1e-4)
    cache = model.new_cache(1)
    piecewise = torch.cat([model(piece, cache=cache) for piece in tokens[None].split(pieces, 1)], 1)[0]
    torch.testing.assert_close(piecewise.double(), expected, rtol=0, atol=1e-4)
