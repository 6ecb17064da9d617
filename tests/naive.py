"""An independent implementation of the model in float64, straight from the equations: loops over tokens, dicts for caches, no zoo code.

It supports attn, swa and gdn blocks, any eviction, span and number of loops, and is slow.
"""

import math

import torch


def rms(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x, position, theta):
    half = x.shape[-1] // 2
    angle = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def attention(x, p, heads, kv_heads, theta, cache, start, reach):
    """x: [T, D]; cache: {position: (key, value)} of earlier tokens."""
    cache, out = dict(cache), []
    for t, row in enumerate(x):
        position = start + t
        q = (p["q_proj.weight"] @ row).view(heads, -1)
        k = (p["k_proj.weight"] @ row).view(kv_heads, -1)
        v = (p["v_proj.weight"] @ row).view(kv_heads, -1)
        cache[position] = rotate(k, position, theta), v
        seen = [c for at, c in cache.items() if at <= position and (reach is None or at > position - reach)]
        q = rotate(q, position, theta)
        mixed = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            score = torch.stack([k[g] @ q[h] for k, _ in seen]) / math.sqrt(q.shape[-1])
            mixed.append(score.softmax(0) @ torch.stack([v[g] for _, v in seen]))
        out.append(p["o_proj.weight"] @ torch.cat(mixed))
    return torch.stack(out), cache


def gated_deltanet(x, p, heads, S, tail):
    """x: [T, D]; S: [H, K, V]; tail: the K-1 earlier inputs of the convolution."""
    out, tail = [], list(tail)
    conv = torch.cat([p["q_conv"], p["k_conv"], p["v_conv"]])
    taps = conv.shape[1]
    keys = p["q_proj.weight"].shape[0]
    for row in x:
        tail.append(torch.cat([p[f"{n}_proj.weight"] @ row for n in "qkv"]))
        mixed = sum(conv[:, j] * tail[len(tail) - taps + j] for j in range(taps))
        mixed = mixed * torch.sigmoid(mixed)
        q, k, v = (part.view(heads, -1) for part in (mixed[:keys], mixed[keys : 2 * keys], mixed[2 * keys :]))
        q, k = (u / torch.sqrt((u * u).sum(-1, keepdim=True) + 1e-6) for u in (q, k))
        decay = torch.exp(-p["A_log"].exp() * torch.log1p(torch.exp(p["a_proj.weight"] @ row + p["dt_bias"])))
        beta = torch.sigmoid(p["b_proj.weight"] @ row)
        states, reads = [], []
        for h in range(heads):
            s = decay[h] * S[h]
            s = s + torch.outer(k[h], beta[h] * (v[h] - s.T @ k[h]))
            states.append(s)
            reads.append(s.T @ q[h] / math.sqrt(q.shape[-1]))
        S = torch.stack(states)
        gate = (p["g_proj.weight"] @ row).view(heads, -1)
        o = rms(torch.stack(reads), p["o_norm.weight"], 1e-5) * gate * torch.sigmoid(gate)
        out.append(p["o_proj.weight"] @ o.flatten())
    return torch.stack(out), S, tail[len(tail) - taps + 1 :]


class NaiveStream:
    """One stream through the weights of a zoo.Model. `asleep` and `awake` follow the equations of a sleep and a wake pass."""

    def __init__(self, model):
        self.c = model.config
        self.p = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
        self.options = {"attn": {"heads": 4}, "swa": {"heads": 4, "window": 2048}, "gdn": {"heads": 4}}
        for kind, given in self.c.blocks.items():
            self.options[kind] = {**self.options.get(kind, {}), **given}
        self.S = {}
        for i, kind in enumerate(self.c.pattern):
            if kind == "gdn":
                heads = self.options["gdn"]["heads"]
                k = self.p[f"blocks.{i}.mixer.q_proj.weight"].shape[0] // heads
                v = self.p[f"blocks.{i}.mixer.v_proj.weight"].shape[0] // heads
                self.S[i] = torch.zeros(heads, k, v, dtype=torch.float64)
        self.position = 0
        self.clear()

    def read(self, ids, when):
        """Embed tokens: [T, D]."""
        h = self.p["embed.weight"][ids]
        return h + self.p["positions.weight"][self.position : self.position + len(ids)] if self.c.learned_positions in (True, when) else h

    def clear(self):
        self.cache = {}
        for i, kind in enumerate(self.c.pattern):
            if kind == "gdn":
                channels = sum(self.p[f"blocks.{i}.mixer.{x}_conv"].shape[0] for x in "qkv")
                taps = self.p[f"blocks.{i}.mixer.q_conv"].shape[1]
                self.cache[i] = [torch.zeros(channels, dtype=torch.float64)] * (taps - 1)
            else:
                self.cache[i] = {}

    def block(self, i, x, window):
        """Run one block over x: [T, D]. Updates S, and stores in `window[i]` the cache that later tokens read."""
        p = {n.removeprefix(f"blocks.{i}."): t for n, t in self.p.items() if n.startswith(f"blocks.{i}.")}
        mixer = {n.removeprefix("mixer."): t for n, t in p.items() if n.startswith("mixer.")}
        kind = self.c.pattern[i]
        option = self.options[kind]
        normed = rms(x, p["mixer_norm.weight"], self.c.norm_eps)
        if kind == "gdn":
            y, self.S[i], window[i] = gated_deltanet(normed, mixer, option["heads"], self.S[i], self.cache[i])
        else:
            reach = [r for r in (self.c.window if self.c.evict == "sliding" else None, option.get("window")) if r]
            y, window[i] = attention(
                normed, mixer, option["heads"], option.get("kv_heads", option["heads"]), option.get("rope_theta", 10000.0),
                self.cache[i], self.position, min(reach, default=None),
            )  # fmt: skip
        x = x + y
        n = rms(x, p["mlp_norm.weight"], self.c.norm_eps)
        gate, up = n @ p["mlp.gate_proj.weight"].T, n @ p["mlp.up_proj.weight"].T
        return x + (gate * torch.sigmoid(gate) * up) @ p["mlp.down_proj.weight"].T

    def awake(self, ids):
        """Run one wake pass and return its logits [T, V]."""
        h, window = self.read(ids, "awake"), {}
        first, last = self.c.span or (0, len(self.c.pattern) - 1)
        for i in range(len(self.c.pattern)):
            if i == first:
                entered = h
            h = self.block(i, h, window)
            if self.c.residual_gates and i == last:
                h = h + self.p["residual_gates"][0] * entered
        self.cache = window
        self.position += len(ids)
        return rms(h, self.p["norm.weight"], self.c.norm_eps) @ self.p.get("head.weight", self.p["embed.weight"]).T

    def asleep(self, ids):
        """Consolidate one chunk, then evict."""
        h, window = self.read(ids, "asleep"), {}
        first, last = self.c.span or (0, len(self.c.pattern) - 1)
        for i in range(first):
            h = self.block(i, h, window)
        start, before = h, dict(self.S)
        for n in range(self.c.loops):
            if not self.c.carry:
                self.S.update({i: before[i] for i in range(first, last + 1) if i in before})
            if n and self.c.loop_norm:
                h = rms(h, self.p["norm.weight"], self.c.norm_eps)
            if n and self.c.inject == "bounded":
                gate = 1 / (1 + torch.exp(-self.p["inject"]))
                h = (1 - gate) * h + gate * start
            elif n and self.c.inject:
                h = h + self.p["inject"] * start
            if not self.c.feed_back:
                h = start
            entered = h
            for i in range(first, last + 1):
                h = self.block(i, h, window)
            if self.c.residual_gates:
                h = h + self.p["residual_gates"][min(n, self.c.residual_gates - 1)] * entered
        for i in range(last + 1, len(self.c.pattern)):
            h = self.block(i, h, window)
        self.cache = window
        self.position += len(ids)
        self.evict()

    def evict(self):
        if self.c.evict == "hard":
            self.clear()
            self.position = 0
        if self.c.evict == "sliding":
            for i, kind in enumerate(self.c.pattern):
                if kind != "gdn":
                    self.cache[i] = {at: kv for at, kv in self.cache[i].items() if at > self.position - self.c.window}
