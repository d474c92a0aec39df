"""p_theta, the decoder: a diffusion transformer that draws an image from a condition.

    z_s = (1 - s) z_0 + s eps       v_theta(z_s, s, c) predicts eps - z_0
    z_{s'} ~ N(mean_theta(z_s, c), std^2)                   log p_theta(z_{s'} | z_s, c): step_logp

s in [0, 1] is the noise level; time runs from s = 1 (noise) to s = 0 (image). The sampler and the
log-prob of stored steps stand side by side, and both come down to `sde_step`. Latents, noise levels
and log-probs are float32 whatever the transformer runs in. Shapes: see model.py.
"""
import copy
import math
from contextlib import nullcontext

import torch
import torch.nn as nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from lib.files import load
from lib.ranks import by_rows


# --- a denoising step ----------------------------------------------------------------------------
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
        safe = torch.where(std > 0, std, 1.0)               # even unused, x / 0 is a nan
        logp = -square / (2 * safe ** 2) - torch.log(safe) - 0.5 * math.log(2 * math.pi)
    logp = torch.where(std > 0, logp, 0.0).flatten(1).mean(1)
    return z_next, logp, mean, std


def per_latent(s, z):
    """A noise level, float, () or (B,), as float32 that broadcasts over z (B, C, H, W)."""
    s = torch.as_tensor(s, dtype=torch.float32, device=z.device)
    return s.view(-1, *[1] * (z.dim() - 1))


# --- the decoder ---------------------------------------------------------------------------------
class Decoder(nn.Module):
    """Stable Diffusion 3's transformer, its VAE and its noise schedule.

    transformer, vae, scheduler: diffusers' own. pooled (1, n): the constant in place of the pooled
    text embedding, zero until lib.checkpoint fills it. Another transformer overrides what is SD3's
    here and has an entry in DECODERS: docs/exchange.md.
    """
    # diffusers' classes beside the transformer, and the pipeline that reads its LoRA files
    vae_class = 'AutoencoderKL'
    scheduler_class = 'FlowMatchEulerDiscreteScheduler'
    pipeline_class = 'StableDiffusion3Pipeline'
    # the attention projections that Flow-GRPO adapts
    lora_targets = r'.*\.attn\.(add_[qkv]_proj|to_add_out|to_[qkv]|to_out\.0)'

    def __init__(self, config, transformer, vae, scheduler):
        super().__init__()
        self.config = config
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.noise_levels = {}                  # S -> the scheduler's, see `sigmas`
        pooled_width = getattr(transformer.config, 'pooled_projection_dim', 0)
        self.register_buffer('pooled', torch.zeros(1, pooled_width), persistent=False)

    @property
    def device(self):
        return self.pooled.device

    @property
    def width(self):
        """D, of a condition."""
        return self.transformer.config.joint_attention_dim

    def autocast(self):
        """Matrix work in config.dtype over float32 master weights; nothing to do in float32."""
        if self.config.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.dtype))

    def check_resolution(self, resolution):
        """What is wrong with images of that side, '' if nothing."""
        halvings = len(self.vae.config.block_out_channels) - 1
        step = 2 ** halvings * self.transformer.config.patch_size
        most = step * self.transformer.config.pos_embed_max_size
        if resolution % step or resolution > most:
            return (f'expected a multiple of {step} up to {most}, for the VAE and the patches of '
                    'the transformer')
        return ''

    def unreachable(self, key):
        """Whether no loss reaches this parameter of the transformer.

        SD3's last block drops what text queries attend to; the tiny pooled embedding is zero.
        """
        blocks = self.transformer.transformer_blocks
        last = f'transformer_blocks.{len(blocks) - 1}.attn.'
        if key.startswith((last + 'add_q', last + 'norm_added_q')):
            return blocks[-1].attn.context_pre_only
        return 'text_embedder.linear_1.w' in key and not self.pooled.any()

    @torch.no_grad()
    def pooled_of_nothing(self, source):
        """(1, n): the pooled CLIP-L and CLIP-G embeddings of the empty string, joined.

        source: the folder or hub id that the text encoders are in.
        """
        parts = []
        for number in ('', '_2'):
            tokenizer = load(CLIPTokenizer, source, subfolder=f'tokenizer{number}')
            token_ids = tokenizer('', padding='max_length', return_tensors='pt').input_ids
            text_encoder = load(CLIPTextModelWithProjection, source,
                                subfolder=f'text_encoder{number}')
            parts.append(text_encoder(token_ids).text_embeds)
        return torch.cat(parts, -1).float()

    def compile_blocks(self):
        """Compiles each transformer block by itself, once for blocks of a kind and all sizes."""
        for block in self.transformer.transformer_blocks:
            block.compile(dynamic=True)

    # --- the transformer -------------------------------------------------------------------------
    def sigmas(self, S):
        """Noise levels of an S-step sampler: (S + 1,) float32 from 1 down to 0."""
        if S not in self.noise_levels:
            scheduler = copy.deepcopy(self.scheduler)           # set_timesteps changes it
            scheduler.set_timesteps(S)
            self.noise_levels[S] = scheduler.sigmas.float().tolist()
        return torch.tensor(self.noise_levels[S], device=self.device)

    def latent_shape(self):
        """(C, H, W) of a latent at config.resolution."""
        halvings = len(self.vae.config.block_out_channels) - 1
        side = self.config.resolution // 2 ** halvings
        return self.vae.config.latent_channels, side, side

    def network(self, z, s, c):
        """The transformer alone: v (B, C, H, W) float32 at noise level s (B,)."""
        dtype = self.transformer.dtype
        pooled = self.pooled.expand(len(z), -1)
        with self.autocast():
            output = self.transformer(hidden_states=z.to(dtype), timestep=1000 * s,
                                      encoder_hidden_states=c.to(dtype),
                                      pooled_projections=pooled.to(dtype), return_dict=False)
        return output[0].float()

    def rows(self, z, s, c):
        """`network` on at most micro_batch rows at a time, where no gradient is wanted."""
        return by_rows(self.network, self.config.micro_batch, z, s.expand(len(z)), c)

    def velocity(self, z, s, c, negative=None):
        """v (B, C, H, W) at noise level s, () or (B,); with guidance v0 + guidance (v - v0).

        negative: the unconditional branch's condition (1, n, D), None without guidance.
        """
        v, v0 = self.branches(z, s, c, negative)
        return self.guided(v, v0)

    def guided(self, v, v0):
        """Classifier-free guidance of the two branches; v0 is None without."""
        if v0 is None:
            return v
        return v0 + self.config.guidance * (v - v0)

    def branches(self, z, s, c, negative):
        """v and v0 (B, C, H, W), v0 without gradient; None without guidance."""
        if negative is None:
            return self.rows(z, s, c), None
        unconditional = negative.expand(len(z), -1, -1)
        if torch.is_grad_enabled():
            with torch.no_grad():
                v0 = self.rows(z, s, unconditional)
            return self.rows(z, s, c), v0
        s = s.expand(len(z)).repeat(2)
        both = self.rows(torch.cat([z, z]), s, torch.cat([c, unconditional]))
        return both.chunk(2)

    # --- condition -> image ----------------------------------------------------------------------
    def draw(self, z, c, S, negative=None, grad_steps=0):
        """ODE sampler: start noise z (B, C, H, W), condition c -> latent at s = 0.

        negative: `UAE.negative`, under guidance. Gradients flow through the last grad_steps of the
        S steps.
        """
        sigmas = self.sigmas(S)
        learning = torch.is_grad_enabled()
        for step in range(S):
            with torch.set_grad_enabled(learning and step >= S - grad_steps):
                v = self.velocity(z, sigmas[step], c, negative)
                z = z + (sigmas[step + 1] - sigmas[step]) * v
        return z

    @torch.no_grad()
    def draw_sde(self, z, c, S, noise, kind, noise_level, window, negative=None):
        """SDE sampler that records its log-probs.

        Steps in window = (begin, end) are stochastic, the others are steps of the ODE. noise
        (B, M, C, H, W): a standard normal per stochastic step. Returns the latent at s = 0, and a
        dict of what an update needs: z, z_next, under guidance v0, each (B, M, C, H, W), and
        recorded, the log-probs (B, M).
        """
        sigmas = self.sigmas(S)
        path = dict(z=[], z_next=[], recorded=[], v0=[])
        begin, end = window
        for step in range(S):
            s, s_next = sigmas[step], sigmas[step + 1]
            v, v0 = self.branches(z, s, c, negative)
            v = self.guided(v, v0)
            if not begin <= step < end:
                z = sde_step(z, v, s, s_next, kind, 0.0, noise=torch.zeros_like(z))[0]
                continue
            z_next, logp, _, _ = sde_step(z, v, s, s_next, kind, noise_level,
                                          noise=noise[:, step - begin])
            path['z'].append(z)
            path['z_next'].append(z_next)
            path['recorded'].append(logp)
            if v0 is not None:
                path['v0'].append(v0)
            z = z_next
        return z, {name: torch.stack(steps, 1) for name, steps in path.items() if steps}

    def step_logp(self, z, z_next, steps, c, S, kind, noise_level, negative=None, v0=None):
        """log p_theta(z_{s'} | z_s, c) of n stored steps, all replayed in one pass of B*n rows.

        z, z_next (B, n, C, H, W), steps: their n numbers among the S denoising steps. v0, like z:
        the velocity of the unconditional branch where it is known, which spares its pass. Returns
        logp (B, n), mean (B, n, C, H, W), std (B, n, 1, 1, 1).
        """
        B, n = z.shape[:2]
        z = z.flatten(0, 1)
        c = c.repeat_interleave(n, 0)
        at = torch.tensor(steps, device=self.device).repeat(B)
        sigmas = self.sigmas(S)
        if v0 is None:
            v = self.velocity(z, sigmas[at], c, negative)
        else:
            v = self.guided(self.rows(z, sigmas[at], c), v0.flatten(0, 1))
        _, logp, mean, std = sde_step(z, v, sigmas[at], sigmas[at + 1], kind, noise_level,
                                      z_next=z_next.flatten(0, 1))
        return logp.view(B, n), mean.unflatten(0, (B, n)), std.unflatten(0, (B, n))

    def forward(self, *args, **options):
        """`step_logp`: what DistributedDataParallel calls, also where a subclass has its own."""
        return self.step_logp(*args, **options)

    # --- latents and images ----------------------------------------------------------------------
    def to_image(self, z):
        """Latent (B, C, H, W) -> image (B, 3, R, R) float32, about [-1, 1]; differentiable."""
        vae = self.vae.config
        z = z / vae.scaling_factor + (vae.shift_factor or 0)
        return by_rows(lambda part: self.vae.decode(part).sample.float(),
                       self.config.micro_batch, z.to(self.vae.dtype))

    @torch.no_grad()
    def to_latent(self, x):
        """Image (B, 3, R, R) in [-1, 1] -> latent (B, C, H, W) float32, the posterior's mean."""
        vae = self.vae.config
        mean = by_rows(lambda part: self.vae.encode(part).latent_dist.mean.float(),
                       self.config.micro_batch, x.to(self.vae.dtype))
        return (mean - (vae.shift_factor or 0)) * vae.scaling_factor


# _class_name of a transformer's config.json -> what drives it
DECODERS = dict(SD3Transformer2DModel=Decoder)
