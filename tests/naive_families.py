"""`NaiveStream` for every kind of block and MLP in the hybrids of tests/data/oracles: float64, token by token, no zoo code."""

import math

import torch
from torch.nn.functional import gelu, relu, silu, softplus

from tests.naive import NaiveStream


def rms(x, weight, eps, centred=False):
    weight = 1.0 if weight is None else 1 + weight if centred else weight
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def linear(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def rotated(x, position, theta, fraction):
    """x: [heads, D]."""
    half = int(fraction * x.shape[-1]) // 2
    angle = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), rest], -1)


def attention(x, p, o, cache, start, reach, centred):
    cache, out = dict(cache), []
    heads, kv_heads = o["heads"], o.get("kv_heads") or o["heads"]
    norm = lambda name, y: rms(y, p[f"{name}.weight"], o.get("norm_eps", 1e-6), o["qk_norm"] == "centred")  # noqa: E731
    for t, row in enumerate(x):
        q, k, v = (linear(p, f"{name}_proj", row) for name in "qkv")
        if o.get("qk_norm_whole"):
            q, k = norm("q_norm", q), norm("k_norm", k)
        q, k, v = q.view(heads, -1), k.view(kv_heads, -1), v.view(kv_heads, -1)
        if o.get("qk_norm") and not o.get("qk_norm_whole"):
            q, k = norm("q_norm", q), norm("k_norm", k)
        q, k = (rotated(y, start + t, o.get("rope_theta", 10_000.0), o.get("rotary", 1.0)) for y in (q, k))
        cache[start + t] = k, v
        seen = [kv for at, kv in cache.items() if at <= start + t and (reach is None or at > start + t - reach)]
        scale, mixed = o.get("scale") or q.shape[-1] ** -0.5, []
        for h in range(heads):
            g = h // (heads // kv_heads)
            mixed.append((torch.stack([k[g] @ q[h] for k, _ in seen]) * scale).softmax(0) @ torch.stack([v[g] for _, v in seen]))
        y = torch.cat(mixed)
        out.append(linear(p, "o_proj", y * linear(p, "g_proj", row).sigmoid() if o.get("gate") else y))
    return torch.stack(out), cache


def convolved(weight, bias, tail, new):
    """Append an input to the tail; returns the convolution at it, and the new tail."""
    taps = weight.shape[1]
    tail = [*tail, new]
    y = sum(weight[:, j] * tail[len(tail) - taps + j] for j in range(taps))
    return y if bias is None else y + bias, tail[len(tail) - taps + 1 :]


def mamba2(x, p, o, S, tail):
    """S: [H, P, N]."""
    heads, P, N = S.shape
    groups, inner, out = o.get("groups", 1), heads * P, []
    scales = o.get("scales") or [1.0] * 5
    for row in x:
        z, u, B, C, dt = linear(p, "in_proj", row).split([inner, inner, groups * N, groups * N, heads])
        z, u, B, C, dt = (part * scale for part, scale in zip((z, u, B, C, dt), scales, strict=True))
        mixed, tail = convolved(p["conv_weight"], p.get("conv_bias"), tail, torch.cat([u, B, C]))
        u, B, C = silu(mixed).split([inner, groups * N, groups * N])
        u, B, C = u.view(heads, P), B.view(groups, N), C.view(groups, N)
        dt = softplus(dt + p["dt_bias"]).clamp(*o.get("dt_limit", (0, math.inf)))
        states, reads = [], []
        for h in range(heads):
            g = h // (heads // groups)
            s = torch.exp(-dt[h] * p["A_log"][h].exp()) * S[h] + dt[h] * torch.outer(u[h], B[g])
            states.append(s)
            reads.append(s @ C[g] + p["D"][h] * u[h])
        S, y = torch.stack(states), torch.cat(reads)
        norm = o.get("norm", "after_gate")
        if norm == "before_gate":
            y = (rms(y.view(groups, -1), p["norm_weight"].view(groups, -1), o["norm_eps"])).flatten() * silu(z)
        else:
            y = y * silu(z)
            y = rms(y.view(groups, -1), p["norm_weight"].view(groups, -1), o["norm_eps"]).flatten() if norm else y
        out.append(linear(p, "o_proj", y))
    return torch.stack(out), S, tail


def mamba(x, p, o, S, tail):
    """S: [C, N]."""
    N, out = S.shape[1], []
    for row in x:
        u, z = linear(p, "in_proj", row).chunk(2)
        u, tail = convolved(p["conv_weight"], p.get("conv_bias"), tail, u)
        u = silu(u)
        low = p["x_proj.weight"] @ u
        low, B, C = low.split([len(low) - 2 * N, N, N])
        if o.get("inner_norm"):
            low, B, C = (rms(y, p.get(f"{n}_norm.weight"), o["norm_eps"]) for n, y in (("dt", low), ("B", B), ("C", C)))
        dt = softplus(linear(p, "dt_proj", low))
        S = torch.exp(-dt[:, None] * p["A_log"].exp()) * S + torch.outer(dt * u, B)
        out.append(linear(p, "o_proj", (S @ C + p["D"] * u) * silu(z)))
    return torch.stack(out), S, tail


def delta_rule(row, q, k, v, p, o, S):
    """Write k and v of one token into S: [HV, K, V], and read it with q. Returns y: [D] and S."""
    heads, states, reads = o["heads"], [], []
    q, k, v = q.view(heads, -1), k.view(heads, -1), v.view(len(S), -1)
    q, k = (y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    decay = torch.exp(-p["A_log"].exp() * softplus(p["a_proj.weight"] @ row + p["dt_bias"]))
    beta = (2 if o.get("neg_eigval") else 1) * torch.sigmoid(p["b_proj.weight"] @ row)
    for h in range(len(S)):
        g = h // (len(S) // heads)
        s = decay[h] * S[h]
        s = s + torch.outer(k[g], beta[h] * (v[h] - s.T @ k[g]))
        states.append(s)
        reads.append(s.T @ q[g] / math.sqrt(q.shape[-1]))
    normed = rms(torch.stack(reads), p["o_norm.weight"], o.get("norm_eps", 1e-5))
    return p["o_proj.weight"] @ (normed.flatten() * silu(p["g_proj.weight"] @ row)), torch.stack(states)


def gdn(x, p, o, S, tail):
    out, keys = [], o["heads"] * S.shape[1]
    conv = torch.cat([p["q_conv"], p["k_conv"], p["v_conv"]])
    for row in x:
        mixed, tail = convolved(conv, None, tail, torch.cat([p[f"{n}_proj.weight"] @ row for n in "qkv"]))
        y, S = delta_rule(row, *silu(mixed).split([keys, keys, len(mixed) - 2 * keys]), p, o, S)
        out.append(y)
    return torch.stack(out), S, tail


def jet(x, p, o, S, tail):
    """A kernel of its own for each token convolves the values."""
    out = []
    for row in x:
        kernel = linear(p, "kernel_out", silu(p["kernel_in.weight"] @ row))
        v, tail = convolved(kernel.view(-1, len(tail) + 1), None, tail, p["v_proj.weight"] @ row)
        q, k = (silu(p[f"{n}_proj.weight"] @ row) for n in "qk")
        y, S = delta_rule(row, q, k, silu(v), p, o, S)
        out.append(y)
    return torch.stack(out), S, tail


def kda(x, p, o, S, tail):
    """S: [H, K, V]."""
    out = []
    conv = torch.cat([p["q_conv"], p["k_conv"], p["v_conv"]])
    for row in x:
        mixed, tail = convolved(conv, None, tail, torch.cat([p[f"{n}_proj.weight"] @ row for n in "qkv"]))
        q, k, v = (y.view(len(S), -1) for y in silu(mixed).chunk(3))
        q, k = (y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        step = softplus(p["f_b_proj.weight"] @ (p["f_a_proj.weight"] @ row) + p["dt_bias"]).view(len(S), -1)
        beta = torch.sigmoid(p["b_proj.weight"] @ row)
        states, reads = [], []
        for h in range(len(S)):
            s = torch.exp(-p["A_log"][h].exp() * step[h])[:, None] * S[h]
            s = s + torch.outer(k[h], beta[h] * (v[h] - s.T @ k[h]))
            states.append(s)
            reads.append(s.T @ q[h] / math.sqrt(q.shape[-1]))
        S = torch.stack(states)
        normed = rms(torch.stack(reads), p["o_norm.weight"], o.get("norm_eps", 1e-5)).flatten()
        gate = p["g_b_proj.weight"] @ (p["g_a_proj.weight"] @ row)
        out.append(p["o_proj.weight"] @ (normed * torch.sigmoid(gate)))
    return torch.stack(out), S, tail


def mla(x, p, o, cache, start, reach):
    """Keys and values of every head, computed from the latents of the cached tokens."""
    cache, out, heads, rank = dict(cache), [], o["heads"], o["rank"]
    U, V = (p[name].view(heads, -1, rank) for name in ("key_up", "value_up"))
    for t, row in enumerate(x):
        q = linear(p, "q_proj", row).view(heads, -1)
        latent, shared = linear(p, "kv_proj", row).split([rank, o["shared_dim"]])
        cache[start + t] = rms(latent, p["kv_norm.weight"], o.get("norm_eps", 1e-6)), shared
        seen = [own for at, own in cache.items() if at <= start + t and (reach is None or at > start + t - reach)]
        mixed = []
        for h in range(heads):
            keys = torch.stack([torch.cat([U[h] @ c, s]) for c, s in seen])
            weights = (keys @ q[h] / math.sqrt(q.shape[-1])).softmax(0)
            mixed.append(weights @ torch.stack([V[h] @ c for c, _ in seen]))
        out.append(linear(p, "o_proj", torch.cat(mixed)))
    return torch.stack(out), cache


def conv(x, p, o, S, tail):
    out = []
    for row in x:
        b, c, u = linear(p, "in_proj", row).chunk(3)
        y, tail = convolved(p["conv_weight"], p.get("conv_bias"), tail, b * u)
        out.append(linear(p, "o_proj", c * y))
    return torch.stack(out), S, tail


def rglru(x, p, o, S, tail):
    """S: [W], or None at the start of a stream."""
    out = []
    for row in x:
        u, tail = convolved(p["conv_weight"], p["conv_bias"], tail, linear(p, "x_proj", row))
        blocks = u.view(p["input_gate"].shape[0], -1)
        i, r = (
            torch.sigmoid(torch.einsum("hi,hij->hj", blocks, p[f"{name}_gate"]) + p[f"{name}_bias"]).flatten()
            for name in ("input", "recurrence")
        )
        a = torch.exp(-8 * r * softplus(p["decay"]))
        S = i * u if S is None else a * S + torch.sqrt(1 - a * a) * i * u
        out.append(linear(p, "o_proj", S * gelu(linear(p, "y_proj", row), approximate="tanh")))
    return torch.stack(out), S, tail


RECURRENT = {"mamba2": mamba2, "mamba": mamba, "gdn": gdn, "jet": jet, "kda": kda, "conv": conv, "rglru": rglru}


def mlp(x, p, kind, o):
    if kind == "relu2":
        return linear(p, "down_proj", relu(linear(p, "up_proj", x)) ** 2)
    if kind in ("swiglu", "gelu"):
        gate = linear(p, "gate_proj", x) * o.get("gate_scale", 1.0)
        gate = silu(gate) if kind == "swiglu" else gelu(gate, approximate="tanh")
        return linear(p, "down_proj", gate * linear(p, "up_proj", x)) * o.get("scale", 1.0)
    return torch.stack([mixture(row, p, o) for row in x])


def mixture(row, p, o):
    logits = p["router.proj.weight"] @ row
    score = logits.sigmoid() if o.get("score") == "sigmoid" else logits.softmax(0)
    rank = score + p.get("router.correction", 0.0)
    chosen = sorted(range(len(rank)), key=lambda e: -rank[e].item())[: o["top_k"]]
    total = sum(score[e] for e in chosen) + o.get("normalise_eps", 0.0) if o.get("normalise", True) else 1.0
    inside = linear(p, "latent_in", row) if o.get("latent") else row
    y, plain = 0.0, o.get("expert") == "relu2"
    for e in chosen:
        h = p["experts.up"][e] @ inside
        h = relu(h) ** 2 if plain else silu(h[: len(h) // 2]) * h[len(h) // 2 :]
        y = y + o.get("scale", 1.0) * score[e] / total * (p["experts.down"][e] @ h)
    y = linear(p, "latent_out", y) if o.get("latent") else y
    if o.get("shared"):
        shared = mlp(row, {n.removeprefix("shared."): t for n, t in p.items()}, "relu2" if plain else "swiglu", {})
        y = y + shared * (torch.sigmoid(p["shared_gate.weight"] @ row) if o.get("shared_gate") else 1.0)
    return y


class NaiveFamily(NaiveStream):
    """One stream through the weights of any hybrid."""

    def __init__(self, model):
        super().__init__(model)
        self.options = {kind: model.config.blocks.get(kind, {}) for kind in self.c.pattern}
        self.S = {}
        for i, block in enumerate(model.blocks):
            kind, fast = self.c.pattern[i], block.mixer.new_fast(1)
            if kind == "rglru":
                self.S[i] = None
            elif fast is not None:
                S = torch.zeros_like(fast[0], dtype=torch.float64)
                self.S[i] = S.mT.contiguous() if kind in ("mamba2", "parallel") else S

    def clear(self):
        self.cache = {}
        for i, kind in enumerate(self.c.pattern):
            p = {n: t for n, t in self.p.items() if n.startswith(f"blocks.{i}.mixer.")}
            if kind in ("gdn", "kda"):
                shapes = [p[f"blocks.{i}.mixer.{n}_conv"].shape for n in "qkv"]
                self.cache[i] = [torch.zeros(sum(s[0] for s in shapes), dtype=torch.float64)] * (shapes[0][1] - 1)
            elif kind == "jet":
                channels = len(p[f"blocks.{i}.mixer.v_proj.weight"])
                taps = len(p[f"blocks.{i}.mixer.kernel_out.weight"]) // channels
                self.cache[i] = [torch.zeros(channels, dtype=torch.float64)] * (taps - 1)
            elif weight := [x for name, x in p.items() if name.endswith(".conv_weight")]:
                channels, taps = weight[0].shape
                tail = [torch.zeros(channels, dtype=torch.float64)] * (taps - 1)
                self.cache[i] = ({}, tail) if kind == "parallel" else tail
            else:
                self.cache[i] = {}

    def read(self, ids, when):
        return super().read(ids, when) * self.c.embed_scale

    def norm(self, p, name, x):
        return rms(x, p[f"{name}.weight"], self.c.norm_eps, self.c.norm == "centred") if f"{name}.weight" in p else x

    def block(self, i, x, window):
        p = {n.removeprefix(f"blocks.{i}."): t for n, t in self.p.items() if n.startswith(f"blocks.{i}.")}
        own = {n.removeprefix("mixer."): t for n, t in p.items() if n.startswith("mixer.")}
        kind, kind_of_mlp = self.c.pattern[i], self.c.mlp_pattern[i]
        o = {"norm_eps": 1e-5, **self.options[kind]} if kind == "mamba2" else self.options[kind]
        normed = self.norm(p, "mixer_norm", x)
        sliding = self.c.window if self.c.evict == "sliding" else None
        if kind == "parallel":
            parts = [{n.removeprefix(f"{half}."): t for n, t in own.items() if n.startswith(f"{half}.")} for half in ("attn", "mamba2")]
            keys, tail = self.cache[i]
            a, keys = attention(o.get("attn_in_scale", 1.0) * normed, parts[0], o["attn"], keys, self.position, sliding, False)
            given = o.get("mamba2_in_scale", 1.0) * normed
            m, self.S[i], tail = mamba2(given, parts[1], {"norm_eps": 1e-5, **o["mamba2"]}, self.S[i], tail)
            y, window[i] = o.get("attn_out_scale", 1.0) * a + o.get("mamba2_out_scale", 1.0) * m, (keys, tail)
        elif kind in RECURRENT:
            y, S, window[i] = RECURRENT[kind](normed, own, o, self.S.get(i), self.cache[i])
            if i in self.S:
                self.S[i] = S
        elif kind == "mla":
            y, window[i] = mla(normed, own, o, self.cache[i], self.position, sliding)
        else:
            reach = [r for r in (sliding, o.get("window")) if r]
            y, window[i] = attention(normed, own, o, self.cache[i], self.position, min(reach, default=None), False)
        x = x + o.get("residual_scale", 1.0) * self.norm(p, "mixer_post_norm", y)
        inside = {n.removeprefix("mlp."): t for n, t in p.items() if n.startswith("mlp.")}
        if not inside:
            return x
        y = mlp(self.norm(p, "mlp_norm", x), inside, kind_of_mlp, self.c.mlps.get(kind_of_mlp, {}))
        return x + o.get("residual_scale", 1.0) * self.norm(p, "mlp_post_norm", y)

    def awake(self, ids):
        h, window = self.read(ids, "awake"), {}
        for i in range(len(self.c.pattern)):
            h = self.block(i, h, window)
        self.cache = window
        self.position += len(ids)
        logits = self.norm(self.p, "norm", h) @ self.p.get("head.weight", self.p["embed.weight"]).T * self.c.logits_scale
        return logits if self.c.logits_cap is None else self.c.logits_cap * torch.tanh(logits / self.c.logits_cap)

    def evict(self):
        if self.c.evict == "hard":
            self.clear()
            self.position = 0
        else:
            self.cache = {i: self.kept(cache) for i, cache in self.cache.items()}

    def kept(self, cache):
        if isinstance(cache, tuple):
            return tuple(map(self.kept, cache))
        return {at: kv for at, kv in cache.items() if at > self.position - self.c.window} if isinstance(cache, dict) else cache
