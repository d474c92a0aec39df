"""UAE: a vision-language model that captions (encoder), an MLP (projector), a diffusion transformer that draws (decoder).

    x --encoder--> y ~ pi_phi(y | x) --encoder--> h_T --projector--> c = g(h_T) --decoder--> x_hat ~ p_theta(. | c)

Everything that has to agree between a rollout and the update that learns from it lives here: the two samplers, and one
log-prob function per policy, which both sides call (`token_logp` for captions, `sde_step` for denoising steps).

Shape alphabet, the same in every file:
    P images per rank   G group   B = P*G   T caption tokens   V vocabulary   L prompt tokens, image tokens among them
    S denoising steps   (C, H, W) latent   d encoder width   D condition width
    x image (P, 3, R, R) in [-1, 1]   y caption tokens (B, T)   mask (B, T) 1 where y was sampled, end token included
    c condition (B, cond_len, D)   z latent (B, C, H, W)   x_hat reconstruction   r reward (P, G)   logp, old_logp, ref_logp

Conventions: s in [0, 1] is the noise level, z_s = (1 - s) z_0 + s eps; the network predicts v = eps - z_0; time runs from
s = 1 (noise) to s = 0 (image). Latents, sigmas and log-probs are float32 whatever the models run in.
"""
import copy
import math
import os
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import common
from common import add_lora, pooled_of_nothing

# where LoRA goes: every linear layer of the language model, never the vision tower, lm_head or projector; in the decoder
# the attention projections that Flow-GRPO adapts
ENCODER_LORA = r'.*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj'
DECODER_LORA = r'.*\.attn\.(add_[qkv]_proj|to_add_out|to_[qkv]|to_out\.0)'


class Projector(nn.Module):
    """g: last-layer hidden states (B, L, d) -> condition (B, L, D), two linear layers (paper: c = g(h_T))."""

    def __init__(self, d, D):
        super().__init__()
        self.up = nn.Linear(d, 2 * D)
        self.down = nn.Linear(2 * D, D)

    def forward(self, h):
        return self.down(F.gelu(self.up(h)))


# --- the two policies' log-probs -----------------------------------------------------------------------------------
def pick_logp(logits, y, temperature=1.0, forbidden=None):
    """log pi(y) of tokens y (n,) under logits (n, V), which may be overwritten: (n,) float32, -inf at a forbidden token."""
    logits = logits.float() / temperature if temperature != 1.0 else logits.float()
    if forbidden is not None:
        logits = logits.masked_fill_(forbidden, -math.inf)
    return -F.cross_entropy(logits, y, reduction='none')


def token_logp(h, head, y, temperature=1.0, forbidden=None, chunk=2 ** 23):
    """log pi(y_t | ...) of given tokens, temperature applied, forbidden tokens out of the normaliser.

    h (B, T, d) hidden states that predict y (B, T); head: d -> V; forbidden (V,) bool. Returns (B, T) float32; -inf at a
    forbidden token. Never holds more than `chunk` logits: with a 152k vocabulary the rows go through in pieces, whose
    logits are recomputed in the backward pass.
    """
    def rows(h, y):
        return pick_logp(head(h), y, temperature, forbidden)

    shape, h, y = y.shape, h.flatten(0, 1), y.flatten()
    n = max(1, chunk // head.weight.shape[0])
    if len(y) <= n:
        return rows(h, y).view(shape)
    parts = [checkpoint(rows, h[i:i + n], y[i:i + n], use_reentrant=False) for i in range(0, len(y), n)]
    return torch.cat(parts).view(shape)


def sde_step(z, v, s, s_next, kind='flow', noise_level=0.7, z_next=None, generator=None, noise=None):
    """One denoising step as a Gaussian policy, and its log-density (Flow-GRPO; CPS: arXiv 2509.05952).

    z, v (B, C, H, W) latent and velocity at noise level s; s > s_next: floats, () or (B,). With z_next given it is scored,
    else it is drawn (from `noise`, a standard normal like z, or `generator`). noise_level 0 is the Euler step of the ODE.
    Returns z_next, logp (B,), mean, std (the step's own, sqrt(-dt) included), all float32. logp is the full Gaussian
    log-density of z_next, mean over the latent's dimensions, 0 where std is 0; its gradient flows through `mean` only.
    """
    z, v = z.float(), v.float()
    s, s_next = (torch.as_tensor(a, dtype=torch.float32, device=z.device) for a in (s, s_next))
    s, s_next = (a.view(-1, *[1] * (z.dim() - 1)) for a in (s, s_next))
    if kind == 'flow':
        dt = s_next - s                                             # < 0
        # the diffusion coefficient is infinite at s = 1; there, as in Flow-GRPO, the first smaller sigma stands in
        sigma = noise_level * torch.sqrt(s / (1 - torch.where(s == 1, s_next, s)))
        mean = z * (1 + sigma ** 2 / (2 * s) * dt) + v * (1 + sigma ** 2 * (1 - s) / (2 * s)) * dt
        std = sigma * torch.sqrt(-dt)
    elif kind == 'cps':
        std = s_next * math.sin(noise_level * math.pi / 2)
        z0, eps = z - s * v, z + (1 - s) * v                        # the image and the noise that v points at
        mean = (1 - s_next) * z0 + torch.sqrt(s_next ** 2 - std ** 2) * eps
    else:
        raise ValueError(f"sde kind {kind!r} is not 'flow' or 'cps'")
    std = std.expand(z.shape[0], *std.shape[1:])
    if z_next is None:
        if noise is None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device if generator else z.device).to(z.device)
        z_next = mean + std * noise
    z_next = z_next.detach().float()
    safe = torch.where(std > 0, std, 1.0)
    logp = -(z_next - mean) ** 2 / (2 * safe ** 2) - torch.log(safe) - 0.5 * math.log(2 * math.pi)
    logp = torch.where(std > 0, logp, 0.0).flatten(1).mean(1)
    return z_next, logp, mean, std


# --- the model -----------------------------------------------------------------------------------------------------
class UAE(nn.Module):
    """Encoder, projector and decoder with everything that samples from them. `c`: the configuration (config.py)."""

    def __init__(self, c, device='cpu', new_projector=False):
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
        super().__init__()
        self.c, self.device = c, torch.device(device)
        ckpt = common.find_checkpoint(c, need_projector=not new_projector)
        full_encoder, full_decoder = (os.path.exists(f'{ckpt}/{p}/config.json') for p in ('encoder', 'decoder/transformer'))
        dtype, self.release = getattr(torch, c.dtype), common.find_release(ckpt)
        masters = dtype if c.lora_rank else torch.float32         # full fine-tuning: what a checkpoint holds is not rounded on the way in
        self.source = f'{self.release}/llm_processor' if self.release and os.path.isdir(f'{self.release}/llm_processor') else c.encoder
        self.processor = common.load(AutoProcessor, self.source)
        self.tokenizer = self.processor.tokenizer
        if self.release and not full_encoder:
            self.encoder, self.decoder, projector = common.load_release(self.release, masters)
        else:
            self.encoder = common.load(Qwen2_5_VLForConditionalGeneration, f'{ckpt}/encoder' if full_encoder else c.encoder, dtype=masters)
            self.decoder = common.load(SD3Transformer2DModel, f'{ckpt}/decoder' if full_decoder else c.decoder, subfolder='transformer', torch_dtype=masters)
        self.vae = common.load(AutoencoderKL, c.decoder, subfolder='vae', torch_dtype=dtype)
        self.scheduler = common.load(FlowMatchEulerDiscreteScheduler, c.decoder, subfolder='scheduler')
        self.projector = Projector(self.encoder.config.text_config.hidden_size, self.decoder.config.joint_attention_dim)
        if ckpt:
            self.projector.load_state_dict(projector if ckpt.startswith('uae:') else load_file(f'{ckpt}/projector.safetensors'))
        if c.lora_rank:
            add_lora(self.encoder, c.lora_rank, ENCODER_LORA, f'{ckpt}/encoder/adapter_model.safetensors')
            add_lora(self.decoder, c.lora_rank, DECODER_LORA, f'{ckpt}/decoder/pytorch_lora_weights.safetensors')
        self.register_buffer('pooled', pooled_of_nothing(c, self.decoder.config.pooled_projection_dim), persistent=False)
        self.requires_grad_(False).eval().to(self.device)
        self.end = self.tokenizer.convert_tokens_to_ids('<|im_end|>')
        # a sampled <|image_pad|> would make re-scoring fail hours into a run; ids past the tokenizer mean nothing
        forbidden = torch.arange(self.head.weight.shape[0]) >= len(self.tokenizer)
        forbidden[[i for i in self.tokenizer.all_special_ids if i != self.end]] = True
        self.register_buffer('forbidden', forbidden.to(self.device), persistent=False)
        self.templates()

    head = property(lambda self: self.encoder.lm_head)
    embed = property(lambda self: self.encoder.get_input_embeddings())

    def templates(self):
        """Token ids around a caption prompt's image and around a text to be drawn, from the processor's chat template."""
        def around(message, mark):
            text = self.processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            return [self.tokenizer(part, add_special_tokens=False).input_ids for part in text.split(mark)]

        user = dict(role='user', content=[dict(type='text', text=self.c.caption_prompt), dict(type='image')])
        self.before_image, self.after_image = around(user, '<|image_pad|>')
        text = dict(role='generate', content=[dict(type='text', text='\0')])
        self.before_text, self.after_text = around(text, '\0')

    def train_only(self, *modules):
        """Marks what a stage trains: requires_grad on, master weights in float32, the rest in c.dtype; returns those parameters.

        'encoder' is the language model without lm_head (where it is tied to the embedding both move) and never the
        vision tower; 'decoder' the transformer, never the VAE. With LoRA only the adapters.
        """
        parts = dict(encoder=self.encoder.model.language_model, projector=self.projector, decoder=self.decoder)
        for name in modules:
            for key, p in parts[name].named_parameters():
                if name == 'decoder' and self.unreachable(key):
                    continue
                if name == 'projector' or not self.c.lora_rank or 'lora_' in key and '.ref.' not in key:
                    p.data = p.data.float()
                    p.requires_grad_(True)
        for p in (*self.encoder.parameters(), *self.decoder.parameters()):
            if not p.requires_grad:
                p.data = p.data.to(getattr(torch, self.c.dtype))
        if self.c.checkpointing:
            (getattr(self.encoder, 'activation_checkpointing_enable', None) or self.encoder.gradient_checkpointing_enable)()      # two names of one thing
            self.decoder.enable_gradient_checkpointing()
        return [p for p in self.parameters() if p.requires_grad]

    def unreachable(self, key):
        """Whether no loss reaches this decoder parameter: the last block drops what its text queries attend to, and the
        pooled embedding is zero at tiny size."""
        last = f'transformer_blocks.{self.decoder.config.num_layers - 1}.attn.'
        return key.startswith((last + 'add_q', last + 'norm_added_q')) or 'text_embedder.linear_1.w' in key and not self.pooled.any()

    def forward(self, loss, *args, **kwargs):
        """loss(self, ...) of a stage script: the one door through which DistributedDataParallel sees a backward pass."""
        towers = (self.encoder.model.language_model, self.decoder) if self.c.checkpointing else ()
        for m in towers:                         # libraries recompute activations in train mode only; nothing here has dropout
            m.train()
        try:
            return loss(self, *args, **kwargs)
        finally:
            for m in towers:
                m.eval()

    @contextmanager
    def parked(self, *names):
        """Context in which the parts named ('encoder', 'decoder', 'vae') wait on the CPU."""
        for name in names:
            getattr(self, name).to('cpu')
        try:
            yield
        finally:
            for name in names:
                getattr(self, name).to(self.device)

    def autocast(self):
        """Matrix work in c.dtype over float32 master weights; nothing to do in float32."""
        return nullcontext() if self.c.dtype == 'float32' else torch.autocast(self.device.type, getattr(torch, self.c.dtype))

    # --- encoder: image -> caption ---------------------------------------------------------------------------------
    def see(self, x):
        """x (P, 3, R, R) in [-1, 1] -> (features (P, N, d), grid (P, 3)): the vision tower, once per image."""
        u8 = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        pix = self.processor.image_processor(images=list(u8), return_tensors='pt')
        grid = pix['image_grid_thw'].to(self.device)
        with self.autocast():
            feats = self.encoder.model.get_image_features(pix['pixel_values'].to(self.device), grid).pooler_output
        return torch.stack(list(feats)), grid

    def prompt(self, seen):
        """Embedded caption prompt: inputs_embeds (P, L, d), position_ids (3, P, L). Images of one size: no padding."""
        feats, grid = seen
        P, N = feats.shape[:2]
        ids = self.before_image + [self.encoder.config.image_token_id] * N + self.after_image
        ids = torch.tensor(ids, device=self.device)[None]
        kinds = (ids == self.encoder.config.image_token_id).int()
        # mm_token_type_ids decides where the image's 2-D positions go; without it they would silently be 1-D
        pos, _ = self.encoder.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid[:1])
        emb = self.embed(ids).expand(P, -1, -1)
        start = len(self.before_image)
        emb = torch.cat([emb[:, :start], feats.to(emb.dtype), emb[:, start + N:]], 1)
        return emb, pos.expand(-1, P, -1)

    def prefill(self, seen, G):
        """Runs the prompt once per image and repeats its cache to the group. -> cache, h_last (B, 1, d), next position."""
        from transformers import DynamicCache
        emb, pos = self.prompt(seen)
        cache = DynamicCache(config=self.encoder.config.text_config)
        out = self.encoder.model.language_model(inputs_embeds=emb, position_ids=pos, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(G)
        return cache, out.last_hidden_state[:, -1:].repeat_interleave(G, 0), pos.max().item() + 1

    @torch.no_grad()
    def sample_captions(self, seen, G=1, temperature=1.0, u=None):
        """G captions per image by cached decoding.

        u (B, T) uniforms in [0, 1), the randomness behind each token; temperature 0 is greedy and needs none.
        Returns y (B, T) (end token, then padding with it), mask (B, T) float, logp (B, T) recorded while sampling.
        """
        T, B = self.c.caption_len, len(seen[0]) * G
        y = torch.full((B, T), self.end, device=self.device)
        mask, logp = torch.zeros(B, T, device=self.device), torch.zeros(B, T, device=self.device)
        alive = torch.ones(B, dtype=torch.bool, device=self.device)
        with self.autocast():
            cache, h, pos = self.prefill(seen, G)
            for t in range(T):
                logits = self.head(h[:, -1]).float().masked_fill_(self.forbidden, -math.inf)
                if temperature == 0:
                    tok = logits.argmax(-1)
                else:                            # inverse CDF: the first token whose cumulated probability exceeds u
                    cdf = (logits / temperature).softmax(-1).double().cumsum(-1)
                    tok = torch.searchsorted(cdf, u[:, t:t + 1].double() * cdf[:, -1:], right=True)[:, 0]
                logp[:, t] = pick_logp(logits, tok, temperature or 1.0) * alive
                y[:, t] = torch.where(alive, tok, self.end)
                mask[:, t] = alive.float()
                alive = alive & (tok != self.end)
                if t == T - 1 or not alive.any():
                    break
                h = common.next_state(self.encoder.model.language_model, self.embed(y[:, t:t + 1]), pos + t, cache)
        return y, mask, logp

    def caption_states(self, seen, y):
        """Last-layer states (B, T + 1, d) of the prompt's last token and of each caption token; state t predicts y[:, t]."""
        G, T = len(y) // len(seen[0]), y.shape[1]
        lm = self.encoder.model.language_model
        if self.c.checkpointing:                 # recomputation forbids the cache: the prompt runs once per caption
            emb, pos = (a.repeat_interleave(G, d) for a, d in zip(self.prompt(seen), (0, 1)))
            new = pos.max() + 1 + torch.arange(T, device=self.device).expand(3, len(y), T)
            out = lm(inputs_embeds=torch.cat([emb, self.embed(y)], 1), position_ids=torch.cat([pos, new], 2), use_cache=False)
            return out.last_hidden_state[:, -T - 1:]
        cache, h, start = self.prefill(seen, G)
        pos = start + torch.arange(T, device=self.device).expand(3, len(y), T)
        out = lm(inputs_embeds=self.embed(y), position_ids=pos, past_key_values=cache, use_cache=True)
        return torch.cat([h, out.last_hidden_state], 1)

    def caption_logp(self, seen, y, temperature=1.0):
        """log pi_phi(y_t | x, y_<t): (B, T) float32, G = B / P captions per image in contiguous blocks; differentiable.

        Entries past the end token are finite but mean nothing: weigh them with the sampler's mask.
        """
        with self.autocast():
            return token_logp(self.caption_states(seen, y)[:, :-1], self.head, y, temperature, self.forbidden)

    def texts(self, y, mask):
        """Tokens -> strings, up to the end token."""
        return [self.tokenizer.decode(t[m.bool() & (t != self.end)], skip_special_tokens=True) for t, m in zip(y.cpu(), mask.cpu())]

    def tokens(self, texts, T=None):
        """Strings -> y, mask (B, T) as the sampler would return them, T = caption_len if None; longer ones are cut, the number cut is returned."""
        ids = [self.tokenizer(t, add_special_tokens=False).input_ids for t in texts]
        T = T or self.c.caption_len
        y = torch.full((len(ids), T), self.end)
        mask = torch.zeros(len(ids), T)
        for i, row in enumerate(ids):
            row = (row + [self.end])[:T]
            y[i, :len(row)] = torch.tensor(row)
            mask[i, :len(row)] = 1
        return y.to(self.device), mask.to(self.device), sum(len(row) >= T for row in ids)

    # --- condition: caption -> c -----------------------------------------------------------------------------------
    def text_condition(self, y, mask):
        """The caption re-encoded alone, the image unseen: a true bottleneck. -> c (B, cond_len, D).

        Padded to cond_len on the right: the same alone and in any batch. What does not fit is cut (log field `truncated`).
        """
        room = self.c.cond_len - len(self.before_text) - len(self.after_text)
        keep = mask.bool() & (y != self.end)
        ids, attend = torch.full((len(y), self.c.cond_len), self.tokenizer.pad_token_id), torch.zeros(len(y), self.c.cond_len, dtype=torch.long)
        for i, (row, k) in enumerate(zip(y.cpu(), keep.cpu())):
            row = self.before_text + row[k].tolist()[:room] + self.after_text
            ids[i, :len(row)], attend[i, :len(row)] = torch.tensor(row), 1
        h = self.encoder.model.language_model(inputs_embeds=self.embed(ids.to(self.device)), attention_mask=attend.to(self.device), use_cache=False).last_hidden_state
        return self.projector(h.to(self.projector.up.weight.dtype))

    def pad(self, h):
        """h (B, n, d) -> (B, cond_len, d), zeros on the right."""
        return F.pad(h[:, :self.c.cond_len], (0, 0, 0, max(0, self.c.cond_len - h.shape[1])))

    def condition(self, y, mask, seen=None):
        """c for captions y (B, T), by c.condition: how the decoder is wired to the encoder (differentiable).

        text         the caption re-encoded alone (default)
        answer       projected states at the caption's positions, in context after the image: the paper's h_T
        image        projected states at the image's positions: reconstruction alignment, caption-free
        text+image   both, concatenated: c = {c_text, c_img} of the paper's stage 3
        `seen` (P images, B = P*G) is needed by all but `text`. (B, cond_len, D), twice as long for text+image.
        """
        with self.autocast():
            kind, dtype = self.c.condition, self.projector.up.weight.dtype
            if kind == 'text':
                return self.text_condition(y, mask)
            if kind == 'answer':
                h = self.caption_states(seen, y)[:, 1:] * (mask * (y != self.end))[..., None]
                return self.projector(self.pad(h).to(dtype))
            emb, pos = self.prompt(seen)
            h = self.encoder.model.language_model(inputs_embeds=emb, position_ids=pos, use_cache=False).last_hidden_state
            start = len(self.before_image)
            h = h[:, start:start + seen[0].shape[1]].repeat_interleave(len(y) // len(h), 0)
            c_img = self.projector(self.pad(h).to(dtype))
            return c_img if kind == 'image' else torch.cat([self.text_condition(y, mask), c_img], 1)

    def negative(self):
        """Condition (1, same length, D) of the unconditional branch: the negative prompt through the text path."""
        with torch.no_grad(), self.autocast():
            y, mask, _ = self.tokens([self.c.negative_prompt])
            c = self.text_condition(y, mask)
            return c if self.c.condition != 'text+image' else torch.cat([c, self.projector(torch.zeros_like(c[:, :, :1]).expand(
                -1, -1, self.projector.up.in_features))], 1)

    # --- decoder: condition -> image -------------------------------------------------------------------------------
    def sigmas(self, S):
        """Noise levels of an S-step sampler, (S + 1,) float32 from 1 down to 0, by the scheduler's own rule."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(S)
        return scheduler.sigmas.float().to(self.device)

    def velocity(self, z, s, c, neg=None, guidance=1.0):
        """v (B, C, H, W) float32 at noise level s, () or (B,); with guidance v0 + guidance (v - v0), v0 without gradient.

        neg: the unconditional branch's condition (1, n, D), or where v0 is known already v0 itself (B, C, H, W).
        """
        if guidance != 1.0:
            if neg.dim() == 4:
                v, v0 = self.velocity(z, s, c), neg
            elif torch.is_grad_enabled():
                with torch.no_grad():
                    v0 = self.velocity(z, s, neg.expand(len(z), -1, -1))
                v = self.velocity(z, s, c)
            else:
                v, v0 = self.branches(z, s, c, neg)
            return v0 + guidance * (v - v0)
        dtype = self.decoder.dtype
        with self.autocast():
            return self.decoder(hidden_states=z.to(dtype), timestep=1000 * s.expand(len(z)), encoder_hidden_states=c.to(dtype),
                                pooled_projections=self.pooled.expand(len(z), -1).to(dtype), return_dict=False)[0].float()

    def branches(self, z, s, c, neg):
        """v, v0 (B, C, H, W) of both branches of the guidance, in one forward pass of 2B rows."""
        both = torch.cat([c, neg.expand(len(c), -1, -1)])
        return self.velocity(torch.cat([z, z]), s.expand(len(z)).repeat(2), both).chunk(2)

    def latent_shape(self):
        side = self.c.resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (self.vae.config.latent_channels, side, side)

    def draw(self, z, c, S, grad_steps=0):
        """ODE sampler: start noise z (B, C, H, W), condition c -> latent at s = 0; gradients through the last grad_steps."""
        sig, neg = self.sigmas(S), self.negative() if self.c.guidance != 1.0 else None
        for i in range(S):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= S - grad_steps):
                z = z + (sig[i + 1] - sig[i]) * self.velocity(z, sig[i], c, neg, self.c.guidance)
        return z

    @torch.no_grad()
    def draw_sde(self, z, c, S, noise, kind, noise_level, window, neg=None):
        """SDE sampler with its log-probs: steps in `window` = (first, last + 1) are stochastic, the others ODE steps.

        noise (B, W, C, H, W): standard normal, one per stochastic step; neg: `negative()`, if there is guidance. Returns
        z_0 (B, C, H, W), path = (z, z_next), with guidance (z, z_next, v0), each (B, W, C, H, W), and logp (B, W) recorded while sampling.
        """
        sig, guided = self.sigmas(S), self.c.guidance != 1.0
        path, logps = [], []
        for i in range(S):
            v, *v0 = self.branches(z, sig[i], c, neg) if guided else (self.velocity(z, sig[i], c),)
            v = v0[0] + self.c.guidance * (v - v0[0]) if guided else v
            inside = window[0] <= i < window[1]
            z_next, logp, _, _ = sde_step(z, v, sig[i], sig[i + 1], kind, noise_level if inside else 0.0,
                                          noise=noise[:, i - window[0]] if inside else torch.zeros_like(z))
            if inside:
                path.append((z, z_next, *v0))
                logps.append(logp)
            z = z_next
        return z, tuple(torch.stack(p, 1) for p in zip(*path)), torch.stack(logps, 1)

    def step_logp(self, path, steps, c, S, kind, noise_level, first, neg=None):
        """The update's log-prob of stored steps, all replayed in one [B * n] forward; differentiable.

        path (z, z_next) from `draw_sde`; steps: n indices into its window, which starts at denoising step `first`. A path with
        v0 spares the unconditional branch while the weights are those of the rollout.
        Returns logp (B, n), mean (B, n, C, H, W), std (B, n, 1, 1, 1).
        """
        z, z_next, *v0 = (p[:, steps].flatten(0, 1) for p in path)
        B, n = len(c), len(steps)
        sig = self.sigmas(S)
        at = torch.tensor(steps, device=self.device).repeat(B) + first
        v = self.velocity(z, sig[at], c.repeat_interleave(n, 0), v0[0] if v0 else neg, self.c.guidance)
        _, logp, mean, std = sde_step(z, v, sig[at], sig[at + 1], kind, noise_level, z_next=z_next)
        return logp.view(B, n), mean.unflatten(0, (B, n)), std.unflatten(0, (B, n))

    def to_image(self, z):
        """Latent (B, C, H, W) -> image (B, 3, R, R) float32, about [-1, 1]; differentiable, in slices of micro_batch."""
        z = (z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)).to(self.vae.dtype)
        return torch.cat([self.vae.decode(part).sample.float() for part in z.split(self.c.micro_batch or len(z))])

    @torch.no_grad()
    def to_latent(self, x):
        """Image (B, 3, R, R) in [-1, 1] -> latent (B, C, H, W) float32 of about unit variance (the posterior's mean)."""
        parts = [self.vae.encode(part.to(self.vae.dtype)).latent_dist.mean.float() for part in x.split(self.c.micro_batch or len(x))]
        return (torch.cat(parts) - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    # --- reference policy and checkpoints --------------------------------------------------------------------------
    def reference(self, name):
        """A UAE whose encoder, projector or decoder is frozen with its present weights (for the KL term: the reference policy); it
        shares every other module, and of that one every weight that is not trained (with LoRA: a second adapter)."""
        ref, tower = copy.copy(self), getattr(self, name)
        shared = {id(p): p for p in tower.parameters() if not p.requires_grad}
        ref._modules = dict(self._modules, **{name: copy.deepcopy(tower, shared)})
        for p in ref._modules[name].parameters():
            p.requires_grad_(False)
        return ref

    def save(self, folder):
        """Writes encoder/, decoder/ and projector.safetensors: full weights, or with LoRA the adapters alone, the
        encoder's in peft's layout, the decoder's as StableDiffusion3Pipeline.save_lora_weights writes it."""
        os.makedirs(folder, exist_ok=True)
        save_file(self.projector.state_dict(), f'{folder}/projector.safetensors')
        if self.c.lora_rank:
            return common.save_lora(self.encoder, self.decoder, folder)
        self.encoder.save_pretrained(f'{folder}/encoder')
        self.decoder.save_pretrained(f'{folder}/decoder/transformer')
