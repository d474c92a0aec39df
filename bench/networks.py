"""The bare networks of a step, called alone on inputs of the step's shapes and dtypes.

The forward and backward passes that the mathematics of a step needs are the least that it can cost:
bench/speed.py measures a step over their sum. Shapes: see model.py.
"""
from functools import partial
from typing import Callable, NamedTuple

import torch
from transformers import DynamicCache

import grpo_decoder
from encoder import CaptionCache, next_state


class Call(NamedTuple):
    """A network that a step calls `times` times on `rows` rows; run(rows) calls it once."""

    name: str
    rows: int
    run: Callable
    times: int
    backward: bool

    def label(self):
        text = f'{self.times} x {self.name}, {self.rows} rows'
        if self.backward:
            text += ' and backward'
        return text

    def repeat(self, uae):
        """All calls of a step, with their backward passes."""
        for _ in range(self.times):
            with torch.set_grad_enabled(self.backward), uae.encoder.autocast():
                out = self.run(self.rows)
            if self.backward:
                out.backward(torch.ones_like(out))


class Networks:
    """The networks of a stage, each called with a number of rows n."""

    def __init__(self, stage):
        c, uae = stage.config, stage.uae
        self.config = c
        self.uae = uae
        self.tower = stage.tower
        self.G = stage.G
        encoder = uae.encoder
        self.encoder = encoder
        self.language_model = encoder.language_model
        self.text_encoder = encoder.text_encoder or encoder.language_model
        blank = torch.zeros(3, c.resolution, c.resolution, dtype=torch.uint8)
        pixels = encoder.processor.image_processor(images=[blank], return_tensors='pt')
        self.pixels = pixels['pixel_values'].to(uae.device)
        self.grid = pixels['image_grid_thw'].to(uae.device)
        merged = encoder.vlm.config.vision_config.spatial_merge_size ** 2
        image_tokens = int(self.grid.prod()) // merged
        self.prompt_len = len(encoder.before_image) + image_tokens + len(encoder.after_image)
        text_len = len(encoder.before_text) + c.caption_len + len(encoder.after_text)
        self.attend = (torch.arange(c.cond_len, device=uae.device) < text_len).long()

    def embedded(self, n, length):
        return self.encoder.embed(torch.zeros(n, length, dtype=torch.long, device=self.uae.device))

    def noise(self, n, shape, dtype, requires_grad=False):
        return torch.randn(n, *shape, device=self.uae.device, dtype=dtype,
                           requires_grad=requires_grad)

    # --- the language model ----------------------------------------------------------------------
    def cached(self, n, length, start, cache):
        """States (n, length, d) of new tokens behind those in the cache."""
        positions = self.encoder.positions_after(start, n, length)
        return self.encoder.run(self.embedded(n, length), positions, cache)

    def prefill(self, n, G, room=0):
        """The prompt once for G captions: the cache of n rows and their last state (n, 1, d)."""
        G = min(n, G)
        cache = DynamicCache(config=self.language_model.config)
        h = self.cached(n // G, self.prompt_len, 0, cache)
        if room:
            cache = CaptionCache(cache, G, room)
        else:
            cache.batch_repeat_interleave(G)
        return cache, h[:, -1:].repeat_interleave(G, 0)

    def captions(self, n, G=1):
        """n captions token by token, G for each image."""
        T = self.config.caption_len
        cache, h = self.prefill(n, G, T)
        self.encoder.head(h)
        for t in range(T - 1):
            position = torch.full((1,), self.prompt_len + t, device=self.uae.device)
            h = next_state(self.language_model, self.embedded(n, 1), position, cache)
            self.encoder.head(h)

    def scores(self, n):
        """Logits (n, T, V) of n captions at once."""
        cache, first = self.prefill(n, self.G)
        others = self.cached(n, self.config.caption_len, self.prompt_len, cache)
        return self.encoder.head(torch.cat([first, others], 1)[:, :-1])

    def text(self, n):
        """Captions to conditions (n, cond_len, D)."""
        out = self.text_encoder(inputs_embeds=self.embedded(n, self.config.cond_len),
                                attention_mask=self.attend.expand(n, -1), use_cache=False)
        return self.uae.projector(out.last_hidden_state.to(self.uae.projector.up.weight.dtype))

    # --- the others ------------------------------------------------------------------------------
    def vision(self, n):
        pixels = self.pixels.repeat(n, 1)
        return self.encoder.vlm.model.get_image_features(pixels, self.grid.repeat(n, 1))

    def decoder(self, n, condition_grad=False, latent_grad=False):
        """v (n, C, H, W), its inputs with the gradients that a step asks of them."""
        decoder = self.uae.decoder
        dtype = decoder.transformer.dtype
        z = self.noise(n, decoder.latent_shape(), dtype, latent_grad)
        c = self.noise(n, (self.config.cond_len, decoder.width), dtype, condition_grad)
        pooled = decoder.pooled.expand(n, -1).to(dtype)
        return decoder.transformer(z, c, pooled, torch.ones(n, device=self.uae.device)).sample

    def vae(self, n, grad=False):
        z = self.noise(n, self.uae.decoder.latent_shape(), self.uae.decoder.vae.dtype, grad)
        return self.uae.decoder.vae.decode(z).sample

    def reward(self, n, grad=False):
        (clip,) = self.tower.towers
        side = clip.pre['crop']
        return clip.tower(self.noise(n, (3, side, side), torch.float32, grad))


# --- what a step needs from them -----------------------------------------------------------------
def whole_groups(B, G, size):
    """Rows of ranks.group_slices, of a number of samples that they divide."""
    if not size:
        return B
    return min(B, max(1, size // G) * G)


def network_calls(stage):
    """What the mathematics of one step needs from the networks: a list of `Call`."""
    c = stage.config
    if c.condition != 'text' or c.checkpointing or c.reward != 'clip':
        raise SystemExit('the bare networks are known for --condition=text --reward=clip '
                         '--checkpointing=False')
    networks = Networks(stage)
    P, G = c.batch, stage.G
    calls = [Call('vision tower', P, networks.vision, 1, False)]
    if stage.name == 'cold_start':
        calls += cold_start_calls(networks, P)
    elif stage.name == 'grpo_encoder':
        calls += grpo_encoder_calls(networks, P, G)
    else:
        calls += grpo_decoder_calls(networks, P, G)
    return [call for call in calls if call.times]


def rows_of_a_denoising_step(c, rows):
    """Guidance runs both branches in one pass."""
    return 2 * rows if c.guidance != 1.0 else rows


def cold_start_calls(net, P):
    c = net.config
    S, K = c.denoise_steps, c.grad_steps
    part = whole_groups(P, 1, c.micro_batch)
    updates = P // part
    unconditional = updates * K if c.guidance != 1.0 else 0
    to_condition = partial(net.decoder, condition_grad=True)
    to_both = partial(net.decoder, condition_grad=True, latent_grad=True)
    before = rows_of_a_denoising_step(c, part)
    return [
        Call('captions token by token', P, net.captions, 1, False),
        Call('caption to condition', part, net.text, updates, True),
        Call('decoder', before, net.decoder, updates * (S - K), False),
        Call('decoder', part, to_condition, updates, True),
        Call('decoder with gradient in z', part, to_both, updates * (K - 1), True),
        Call('decoder', part, net.decoder, unconditional, False),
        Call('vae', part, partial(net.vae, grad=True), updates, True),
        Call('reward tower', part, net.reward, updates, False),
        Call('reward tower', part, partial(net.reward, grad=True), updates, True),
    ]


def passes(name, rows, run, times, size):
    """`times` calls on `rows` rows each, which go in passes of at most `size` rows (0 = all)."""
    at_once = min(rows, size or rows)
    return Call(name, at_once, run, times * (rows // at_once), False)


def drawing_calls(net, B, G, captions):
    """A rollout's drawings and rewards; captions: how many of an image are drawn."""
    c = net.config
    P = B // G
    denoised = rows_of_a_denoising_step(c, B)
    return [
        passes('caption to condition', P * captions, net.text, 1, c.micro_batch),
        passes('decoder', denoised, net.decoder, c.denoise_steps, c.micro_batch),
        passes('vae', B, net.vae, 1, c.micro_batch),
        Call('reward tower', P, net.reward, 1, False),
        Call('reward tower', B, net.reward, 1, False),
    ]


def grpo_encoder_calls(net, P, G):
    c, B = net.config, P * G
    write = partial(net.captions, G=G)
    part = min(B, c.micro_batch or B)
    updates = B // part
    of_reference = updates if c.kl else 0
    return [
        Call('captions token by token', B, write, 1, False),
        *drawing_calls(net, B, G, captions=G),
        Call('captions at once', part, net.scores, updates, True),
        Call('captions at once', part, net.scores, of_reference, False),
    ]


def grpo_decoder_calls(net, P, G):
    """Rows are samples times their trained steps."""
    c, B = net.config, P * G
    _, trained = grpo_decoder.window(0, c, net.uae.decoder.sigmas(c.denoise_steps))
    rows = B * len(trained)
    part = min(rows, c.micro_batch or rows)
    updates = rows // part
    calls = [
        Call('captions token by token', P, net.captions, 1, False),
        *drawing_calls(net, B, G, captions=1),
        Call('decoder', part, net.decoder, updates, True),
    ]
    if c.kl:
        branches = rows_of_a_denoising_step(c, part)
        calls.append(passes('decoder', branches, net.decoder, updates, c.micro_batch))
    return calls
