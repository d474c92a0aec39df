"""The two policies: how a token and a denoising step are chosen, and how likely the choice was.

A rollout and the update that learns from it call the same functions, so that their log-probs
agree. The caption policy pi_phi(y_t | x, y_<t) chooses tokens; the drawing policy
p_theta(z_next | z, c) is a Gaussian around one step of the sampler. Shapes: see model.py.
"""
import inspect
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# --- captions: a token -------------------------------------------------------------------------
class CaptionCache:
    """Keys and values of G captions per image, allocated once for all tokens to come.

    A cache that grows is copied whole for every token. prompt: the library's cache of P images,
    whose layers hold keys and values (P, H, L, D). room: how many tokens follow.
    """

    def __init__(self, prompt, G, room):
        self.keys = [self.allocate(layer.keys, G, room) for layer in prompt.layers]
        self.values = [self.allocate(layer.values, G, room) for layer in prompt.layers]
        self.filled = [layer.keys.shape[2] for layer in prompt.layers]

    def allocate(self, prompt, G, room):
        P, H, L, D = prompt.shape
        whole = prompt.new_empty(P * G, H, L + room, D)
        whole[:, :, :L] = prompt.repeat_interleave(G, 0)
        return whole

    def update(self, k, v, i):
        """Adds one token's k, v (B, H, 1, D) to layer i -> its keys and values so far."""
        n = self.filled[i]
        self.keys[i][:, :, n:n + 1] = k
        self.values[i][:, :, n:n + 1] = v
        self.filled[i] = n + 1
        return self.keys[i][:, :, :n + 1], self.values[i][:, :, :n + 1]


def cached_states(language_model, embedded, positions, cache):
    """States (B, L, d) of tokens that follow those in the library's cache, which grows.

    embedded (B, L, d), positions (3, B, L).
    """
    # transformers 5.17 knows past_key_values alone, 5.40 will know cache alone
    known = inspect.signature(language_model.forward).parameters
    name = 'cache' if 'cache' in known else 'past_key_values'
    output = language_model(inputs_embeds=embedded, position_ids=positions, use_cache=True,
                            **{name: cache})
    return output.last_hidden_state


def next_state(language_model, x, position, cache):
    """One more token of every row through a Qwen2.5 language model.

    The library's own forward builds masks, copies the keys to each head and runs seven kernels a
    norm; without these a token takes 1 / 1.3 of the time where kernels are small. x (B, 1, d)
    embedded tokens, position theirs; grows `cache`. Returns (B, 1, d).
    """
    def norm(layer, x):
        return torch.rms_norm(x, layer.weight.shape, layer.weight, layer.variance_epsilon)

    angle = position * language_model.rotary_emb.inv_freq.float()
    cos = torch.cat([angle, angle]).cos().to(x.dtype)
    sin = torch.cat([-angle, angle]).sin().to(x.dtype)      # the first half is negated
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
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + attention.o_proj(mixed.reshape(len(x), 1, -1))
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    return norm(language_model.norm, x)


def choose(logits, u):
    """Samples tokens (B,) from logits (B, V) by the inverse of the cumulated distribution.

    u (B, 1) uniforms in [0, 1): the first token whose cumulated probability exceeds u.
    """
    probs = logits.softmax(-1)
    if probs.device.type != 'mps':              # which has no float64
        probs = probs.double()
    cumulated = probs.cumsum(-1)
    u = u.to(probs.dtype) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, u, right=True)[:, 0]


def pick_logp(logits, y, temperature=1.0, forbidden=None):
    """log pi(y) of tokens y (n,) under logits (n, V), which may be overwritten.

    Returns (n,) float32, -inf at a forbidden token. forbidden (V,) bool leaves the normaliser.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if forbidden is not None:
        logits = logits.masked_fill_(forbidden, -math.inf)
    return -F.cross_entropy(logits, y, reduction='none')


def token_logp(states, head, y, temperature=1.0, forbidden=None, chunk=2 ** 23):
    """log pi(y_t | ...) of given tokens, from the states that predict them.

    states (B, T, d), y (B, T), head: d -> V. Returns (B, T) float32. Never holds more than `chunk`
    logits: with a vocabulary of 152k the rows go in pieces, recomputed in the backward pass.
    """
    def rows_logp(states, y):
        return pick_logp(head(states), y, temperature, forbidden)

    B, T = y.shape
    states = states.flatten(0, 1)
    y = y.flatten()
    rows = max(1, chunk // head.weight.shape[0])
    if len(y) <= rows:
        return rows_logp(states, y).view(B, T)
    pieces = zip(states.split(rows), y.split(rows))
    parts = [checkpoint(rows_logp, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(parts).view(B, T)


# --- drawings: a denoising step ----------------------------------------------------------------
def sde_step(z, v, s, s_next, kind='flow', noise_level=0.7, z_next=None, generator=None,
             noise=None):
    """One denoising step as a Gaussian policy, and its log-prob.

    kind 'flow' is Flow-GRPO's SDE with the full log-density, 'cps' the coefficient-preserving one
    (arXiv 2509.05952) with its authors' log-prob -(z_next - mean)^2, 'cps_exact' the same step
    with the full log-density. All are means over the latent's dimensions.

    z, v (B, C, H, W) at noise level s; s > s_next, floats, () or (B,). z_next is scored if given,
    else drawn from `noise`, a standard normal like z, or from `generator`. noise_level 0 is the
    Euler step of the ODE. Returns z_next, logp (B,), mean, std (B, 1, 1, 1), all float32. logp is
    0 where std is 0, and its gradient flows through `mean` only.
    """
    z = z.float()
    v = v.float()
    s = per_latent(s, z)
    s_next = per_latent(s_next, z)
    if kind == 'flow':
        dt = s_next - s                                     # < 0
        # sigma is infinite at s = 1; there, as in Flow-GRPO, the next noise level stands in
        s_finite = torch.where(s == 1, s_next, s)
        sigma = noise_level * torch.sqrt(s / (1 - s_finite))
        # the drift takes out what the noise adds, so that the marginals stay those of the ODE
        z_scale = 1 + sigma ** 2 / (2 * s) * dt
        v_scale = 1 + sigma ** 2 * (1 - s) / (2 * s)
        mean = z * z_scale + v * v_scale * dt
        std = sigma * torch.sqrt(-dt)
    elif kind in ('cps', 'cps_exact'):
        std = s_next * math.sin(noise_level * math.pi / 2)
        z_0 = z - s * v                                     # the image that v points at
        eps = z + (1 - s) * v                               # and the noise
        mean = (1 - s_next) * z_0 + torch.sqrt(s_next ** 2 - std ** 2) * eps
    else:
        raise ValueError(f"sde kind {kind!r} is not 'flow', 'cps' or 'cps_exact'")

    std = std.expand(z.shape[0], *std.shape[1:])
    if z_next is None:
        if noise is None:
            source = generator.device if generator else z.device
            noise = torch.randn(z.shape, generator=generator, device=source).to(z.device)
        z_next = mean + std * noise
    z_next = z_next.detach().float()

    square = (z_next - mean) ** 2
    if kind == 'cps':
        logp = -square
    else:
        safe = torch.where(std > 0, std, 1.0)               # no division by 0, not even unused
        logp = -square / (2 * safe ** 2) - torch.log(safe) - 0.5 * math.log(2 * math.pi)
    logp = torch.where(std > 0, logp, 0.0).flatten(1).mean(1)
    return z_next, logp, mean, std


def per_latent(s, z):
    """A noise level, float, () or (B,), as float32 that broadcasts over z (B, C, H, W)."""
    s = torch.as_tensor(s, dtype=torch.float32, device=z.device)
    return s.view(-1, *[1] * (z.dim() - 1))
