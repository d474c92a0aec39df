"""One token at a time of a Qwen2.5 language model, as fast as it gets, for `Encoder.sample`.

Taken on trust: a test compares every state with the library's own.
"""
import torch
import torch.nn.functional as F


class CaptionCache:
    """Keys and values of G captions per image, allocated once for all tokens to come.

    A cache that grows is copied whole for every token. prompt: the library's cache of P images,
    whose layers hold keys and values (P, H, L, D). room: how many tokens follow. fixed: each token
    attends to all places, those to come masked, as a captured graph needs it; else to the filled.
    """

    def __init__(self, prompt, G, room, fixed=False):
        device = prompt.layers[0].keys.device
        length = prompt.layers[0].keys.shape[2]
        self.fixed = fixed
        self.place = torch.full((1,), length, device=device)        # of the next token
        self.places = torch.arange(-(-(length + room) // 8) * 8, device=device)
        self.keys = [self.allocate(layer.keys, G) for layer in prompt.layers]
        self.values = [self.allocate(layer.values, G) for layer in prompt.layers]

    def allocate(self, prompt, G):
        P, H, L, D = prompt.shape
        whole = prompt.new_zeros(P * G, H, len(self.places), D)
        whole[:, :, :L] = prompt.repeat_interleave(G, 0)
        return whole

    def update(self, k, v, i):
        """Adds one token's k, v (B, H, 1, D) to layer i -> the keys and values to attend to."""
        self.keys[i].index_copy_(2, self.place, k)
        v = v.to(self.values[i].dtype)      # transformers 5.17 keeps them in the keys' precision
        self.values[i].index_copy_(2, self.place, v)
        if self.fixed:
            return self.keys[i], self.values[i]
        n = self.place.item() + 1
        return self.keys[i][:, :, :n], self.values[i][:, :, :n]

    def mask(self):
        """Where the next token attends to, bool (1, 1, 1, places); None = to all it is given."""
        if self.fixed:
            return (self.places <= self.place).view(1, 1, 1, -1)
        return None


def next_state(language_model, x, position, cache):
    """One more token of every row through a Qwen2.5 language model.

    The library's own forward builds masks, copies the keys to each head and runs seven kernels a
    norm; without these a token takes three quarters of the time where kernels are small. embedded
    tokens x (B, 1, d), their position (1,); fills one place of `cache`. Returns (B, 1, d).
    """
    def norm(layer, x):
        return torch.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)

    angle = position * language_model.rotary_emb.inv_freq.float()
    cos = torch.cat([angle, angle]).cos().to(x.dtype)
    sin = torch.cat([-angle, angle]).sin().to(x.dtype)      # the first half is negated
    mask = cache.mask()
    for i, layer in enumerate(language_model.layers):
        attention = layer.self_attn
        h = norm(layer.input_layernorm, x)
        heads = (len(h), -1, 1, attention.head_dim)
        q = attention.q_proj(h).view(heads)
        k = attention.k_proj(h).view(heads)
        v = attention.v_proj(h).view(heads)
        # rotary embedding of queries and keys at once: the two halves swap places
        qk = torch.cat([q, k], 1)
        qk = torch.addcmul(qk * cos, qk.roll(attention.head_dim // 2, -1), sin)
        q, k = qk.split([q.shape[1], k.shape[1]], 1)
        k, v = cache.update(k, v, i)
        # query heads that share a key head go in as rows of one query
        q = q.reshape(len(x), k.shape[1], -1, attention.head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attention.o_proj(mixed.reshape(len(x), 1, -1))
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    cache.place.add_(1)
    return norm(language_model.norm, x)


def captured(step):
    """A call without arguments -> the same as one CUDA graph, which is launched whole.

    A token at 3B is 36 layers of small kernels: launched one by one they take four times as long
    (docs/results.md, speed). `step` works in place and has run before; capturing does not run it.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
