"""UAE: a vision-language model that captions (encoder), an MLP (projector), a diffusion transformer
that draws (decoder).

    x --encoder--> y ~ pi_phi(y | x) --encoder--> h_T --projector--> c = g(h_T) --decoder--> x_hat

The two samplers are here, and beside each the log-prob that the update takes of what was sampled
(`sample_captions` and `caption_logp`, `draw_sde` and `step_logp`); both come down to policy.py.

Shape alphabet, the same in every file:
    P images per rank   G group   B = P*G   T caption tokens   V vocabulary   L prompt tokens
    S denoising steps   W noisy ones   (C, H, W) latent   d encoder width   D condition width
    x image (P, 3, R, R) in [-1, 1]   y caption tokens (B, T)
    mask (B, T), 1 where y was sampled, end token included
    c condition (B, cond_len, D)   z latent (B, C, H, W)   x_hat reconstruction
    r reward (P, G)   logp, old_logp, ref_logp log-probs   s noise level   v velocity

s in [0, 1] is the noise level, z_s = (1 - s) z_0 + s eps. The network predicts v = eps - z_0, and
time runs from s = 1 (noise) to s = 0 (image). Latents, sigmas and log-probs are float32 whatever
the models run in; under bfloat16 the logits behind a log-prob are rounded to bfloat16.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts import Parts
from policy import CaptionCache, cached_states, choose, next_state, pick_logp, sde_step, token_logp


class Projector(nn.Module):
    """g: last-layer hidden states (B, L, d) -> condition (B, L, D), two linear layers."""

    def __init__(self, d, D):
        super().__init__()
        self.up = nn.Linear(d, 2 * D)
        self.down = nn.Linear(2 * D, D)

    def forward(self, states):
        return self.down(F.gelu(self.up(states)))


# --- the model -----------------------------------------------------------------------------------
class UAE(Parts):
    """Encoder, projector and decoder with everything that samples from them.

    config: the keys (config.py). The parts come built: `checkpoint.open_uae` loads them,
    `tools.plan.skeleton` makes them with random weights. pooled (1, n): the decoder's constant
    pooled embedding. text_encoder: the frozen language model that re-encodes captions, None where
    the captioner does it itself.
    """

    def __init__(self, config, encoder, projector, decoder, vae, scheduler, processor, pooled,
                 device='cpu', text_encoder=None):
        super().__init__()
        self.config = config
        self.device = torch.device(device)
        self.encoder = encoder
        self.projector = projector
        self.decoder = decoder
        self.vae = vae
        self.text_encoder = text_encoder
        self.scheduler = scheduler
        self.noise_levels = {}                  # S -> the scheduler's, see `sigmas`
        self.source = config.encoder                 # folder or hub id of the processor
        self.release = ''                       # folder of the authors' release under the weights
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.end = self.tokenizer.convert_tokens_to_ids('<|im_end|>')
        self.register_buffer('pooled', pooled, persistent=False)
        # a sampled <|image_pad|> would make re-scoring fail hours into a run, and ids past the
        # tokenizer mean nothing
        forbidden = torch.arange(self.head.weight.shape[0]) >= len(self.tokenizer)
        special = [token for token in self.tokenizer.all_special_ids if token != self.end]
        forbidden[special] = True
        self.register_buffer('forbidden', forbidden, persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.read_templates()

    @property
    def head(self):
        return self.encoder.lm_head

    @property
    def embed(self):
        return self.encoder.get_input_embeddings()

    def read_templates(self):
        """Token ids around a caption prompt's image, and around a text that is to be drawn."""
        ask = dict(type='text', text=self.config.caption_prompt)
        user = dict(role='user', content=[ask, dict(type='image')])
        self.before_image, self.after_image = self.ids_around(user, '<|image_pad|>')
        text = dict(role='generate', content=[dict(type='text', text='\0')])
        self.before_text, self.after_text = self.ids_around(text, '\0')
        negative = self.tokenizer(self.config.negative_prompt, add_special_tokens=False).input_ids
        self.negative_length = min(len(negative), self.config.caption_len - 1)

    def ids_around(self, message, mark):
        """Token ids before and after `mark` in a message under the chat template."""
        text = self.processor.apply_chat_template([message], tokenize=False,
                                                  add_generation_prompt=True)
        before, after = text.split(mark)
        return [self.tokenizer(part, add_special_tokens=False).input_ids
                for part in (before, after)]

    # --- encoder: image -> caption ---------------------------------------------------------------
    def see(self, x):
        """x (P, 3, R, R) in [-1, 1] -> (features (P, N, d), grid (P, 3)), the vision tower."""
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        patches = self.processor.image_processor(images=list(pixels), return_tensors='pt')
        grid = patches['image_grid_thw'].to(self.device)
        pixel_values = patches['pixel_values'].to(self.device)
        with self.autocast():
            features = self.encoder.model.get_image_features(pixel_values, grid).pooler_output
        return torch.stack(list(features)), grid

    def prompt(self, seen):
        """Embedded caption prompt of P images of one size: inputs_embeds (P, L, d), positions.

        positions (3, P, L): time, row and column of each token, by the library's own rule.
        """
        features, grid = seen
        P, N = features.shape[:2]
        image = self.encoder.config.image_token_id
        token_ids = self.before_image + [image] * N + self.after_image
        token_ids = torch.tensor(token_ids, device=self.device)[None]
        # the token types say where the image's rows and columns go; without them the image would
        # silently get the positions of text
        types = (token_ids == image).int()
        positions, _ = self.encoder.model.get_rope_index(token_ids, mm_token_type_ids=types,
                                                         image_grid_thw=grid[:1])
        embedded = self.embed(token_ids).expand(P, -1, -1)
        start = len(self.before_image)
        before, after = embedded[:, :start], embedded[:, start + N:]
        embedded = torch.cat([before, features.to(embedded.dtype), after], 1)
        return embedded, positions.expand(-1, P, -1)

    def prefill(self, seen, G, room=0):
        """Runs the prompt once per image and repeats its cache for the group.

        room: tokens that will follow one by one, 0 = all at once. Returns the cache, the last state
        (B, 1, d), and the position of the next token.
        """
        from transformers import DynamicCache
        embedded, positions = self.prompt(seen)
        cache = DynamicCache(config=self.encoder.config.text_config)
        read = cached_states(self.language_model, embedded, positions, cache)
        if room:
            cache = CaptionCache(cache, G, room)
        else:
            cache.batch_repeat_interleave(G)
        states = read[:, -1:].repeat_interleave(G, 0)
        return cache, states, positions.max().item() + 1

    @torch.no_grad()
    def sample_captions(self, seen, G=1, temperature=1.0, uniforms=None):
        """G captions per image by cached decoding.

        uniforms (B, T) in [0, 1): the randomness behind each token. temperature 0 is greedy and
        needs none. Returns y (B, T), the end token and then padding with it; mask (B, T)
        float; logp (B, T), recorded while sampling.
        """
        T = self.config.caption_len
        B = len(seen[0]) * G
        y = torch.full((B, T), self.end, device=self.device)
        mask = torch.zeros(B, T, device=self.device)
        logp = torch.zeros(B, T, device=self.device)
        alive = torch.ones(B, dtype=torch.bool, device=self.device)
        with self.autocast():
            cache, states, start = self.prefill(seen, G, T)
            for t in range(T):
                logits = self.head(states[:, -1]).float()
                logits = logits.masked_fill_(self.forbidden, -math.inf)
                if temperature == 0:
                    token = logits.argmax(-1)
                    logp[:, t] = pick_logp(logits, token) * alive
                else:
                    token = choose(logits / temperature, uniforms[:, t:t + 1])
                    logp[:, t] = pick_logp(logits, token, temperature) * alive
                y[:, t] = torch.where(alive, token, self.end)
                mask[:, t] = alive.float()
                alive = alive & (token != self.end)
                if t == T - 1 or not alive.any():
                    break
                embedded = self.embed(y[:, t:t + 1])
                states = next_state(self.language_model, embedded, start + t, cache)
        return y, mask, logp

    def caption_states(self, seen, y):
        """States (B, T + 1, d) of the prompt's last token and of each caption token.

        State t has read y[:, :t] and predicts y[:, t].
        """
        B, T = y.shape
        G = B // len(seen[0])
        if self.config.checkpointing:    # recomputation forbids the cache: one prompt per caption
            embedded, positions = self.prompt(seen)
            embedded = embedded.repeat_interleave(G, 0)
            positions = positions.repeat_interleave(G, 1)
            return self.states_after(embedded, positions, y)
        cache, states, start = self.prefill(seen, G)
        positions = start + torch.arange(T, device=self.device).expand(3, B, T)
        read = cached_states(self.language_model, self.embed(y), positions, cache)
        return torch.cat([states, read], 1)

    def states_after(self, embedded, positions, y):
        """`caption_states` from an embedded prompt (B, L, d) per caption, in one pass."""
        B, T = y.shape
        ahead = positions.max() + 1 + torch.arange(T, device=self.device).expand(3, B, T)
        output = self.language_model(inputs_embeds=torch.cat([embedded, self.embed(y)], 1),
                                     position_ids=torch.cat([positions, ahead], 2), use_cache=False)
        return output.last_hidden_state[:, -T - 1:]

    def caption_logp(self, seen, y, temperature=1.0):
        """log pi_phi(y_t | x, y_<t): (B, T) float32, differentiable.

        G = B / P captions per image in contiguous blocks. Entries past the end token are finite
        but mean nothing: weigh them with the sampler's mask.
        """
        with self.autocast():
            states = self.caption_states(seen, y)[:, :-1]
            return token_logp(states, self.head, y, temperature, self.forbidden)

    def spoken(self, y, mask):
        """(B, T) bool: the caption's own tokens, without the end token and what follows it."""
        return mask.bool() & (y != self.end)

    def texts(self, y, mask):
        """Tokens -> strings, up to the end token."""
        kept = self.spoken(y, mask).cpu()
        return [self.tokenizer.decode(row[keep], skip_special_tokens=True)
                for row, keep in zip(y.cpu(), kept)]

    def tokens(self, texts, T=None):
        """Strings -> y, mask (B, T) as the sampler returns them, and how many were cut.

        T is caption_len if it is not given.
        """
        T = T or self.config.caption_len
        y = torch.full((len(texts), T), self.end)
        mask = torch.zeros(len(texts), T)
        cut = 0
        for i, text in enumerate(texts):
            token_ids = self.tokenizer(text, add_special_tokens=False).input_ids
            cut += len(token_ids) >= T
            row = (token_ids + [self.end])[:T]
            y[i, :len(row)] = torch.tensor(row)
            mask[i, :len(row)] = 1
        return y.to(self.device), mask.to(self.device), cut

    # --- condition: caption -> c -----------------------------------------------------------------
    def text_condition(self, y, mask, width=0):
        """The caption re-encoded alone, the image unseen: a true bottleneck. -> (B, cond_len, D).

        Padded on the right to cond_len, or to `width`, so that c is the same alone and in any
        batch. What does not fit is cut (log field `truncated`).
        """
        token_ids, attend = self.text_ids(y, mask, width)
        language_model = self.text_encoder or self.language_model
        embedded = language_model.get_input_embeddings()(token_ids)
        output = language_model(inputs_embeds=embedded, attention_mask=attend, use_cache=False)
        return self.project(output.last_hidden_state)

    def text_ids(self, y, mask, width=0):
        """Captions in the template of a text to be drawn: ids and attention (B, cond_len)."""
        spoken = self.spoken(y, mask)
        start = len(self.before_text)
        around = start + len(self.after_text)
        width = width or self.config.cond_len
        if not width:       # cond_len 0, as the release: the longest row or the negative prompt
            longest = spoken.sum(1).max().item()
            width = around + max(longest, self.negative_length)
        room = width - around
        spoken = spoken[:, :room]
        end = start + spoken.sum(1, keepdim=True)               # (B, 1)
        token_ids = torch.full((len(y), width), self.tokenizer.pad_token_id, device=self.device)
        token_ids[:, :start] = torch.tensor(self.before_text, device=self.device)
        caption = torch.where(spoken, y[:, :room], self.tokenizer.pad_token_id)
        token_ids[:, start:start + spoken.shape[1]] = caption
        for place, token in enumerate(self.after_text):
            token_ids.scatter_(1, end + place, token)
        places = torch.arange(width, device=self.device)
        attend = (places < end + len(self.after_text)).long()
        return token_ids, attend

    def image_condition(self, seen):
        """Projected states at the image's positions of the caption prompt: (P, cond_len, D)."""
        embedded, positions = self.prompt(seen)
        output = self.language_model(inputs_embeds=embedded, position_ids=positions,
                                     use_cache=False)
        start = len(self.before_image)
        N = seen[0].shape[1]
        return self.project(self.pad(output.last_hidden_state[:, start:start + N]))

    def project(self, states):
        """g(states) in the projector's own precision."""
        return self.projector(states.to(self.projector.up.weight.dtype))

    def pad(self, states):
        """(B, n, d) -> (B, cond_len, d), zeros on the right; as it is where cond_len is 0."""
        if not self.config.cond_len:
            return states
        states = states[:, :self.config.cond_len]
        return F.pad(states, (0, 0, 0, self.config.cond_len - states.shape[1]))

    def condition(self, y, mask, seen=None):
        """c for captions y (B, T), by config.condition: how the decoder is wired to the encoder.

        text         the caption re-encoded alone (default)
        answer       projected states at the caption's positions after the image: the paper's h_T
        image        projected states at the image's positions: reconstruction alignment
        text+image   both, concatenated: c = {c_text, c_img} of the paper's stage 3
        `seen`, P images of B = P*G captions, is needed by all but `text`. Differentiable.
        Returns (B, cond_len, D), twice as long for text+image.
        """
        kind = self.config.condition
        with self.autocast():
            if kind == 'text':
                return self.text_condition(y, mask)
            if kind == 'answer':
                states = self.caption_states(seen, y)[:, 1:]    # state t + 1 has read token t
                states = states * self.spoken(y, mask)[..., None]
                return self.project(self.pad(states))
            c_img = self.image_condition(seen)
            c_img = c_img.repeat_interleave(len(y) // len(c_img), 0)
            if kind == 'image':
                return c_img
            return torch.cat([self.text_condition(y, mask), c_img], 1)

    @torch.no_grad()
    def negative(self, width=0):
        """Condition of the unconditional branch, the negative prompt's, as long as `condition`'s.

        width: its length where cond_len is 0. Returns (1, cond_len, D).
        """
        with self.autocast():
            y, mask, _ = self.tokens([self.config.negative_prompt])
            c = self.text_condition(y, mask, width)
            if self.config.condition != 'text+image':
                return c
            nothing = torch.zeros(1, c.shape[1], self.projector.up.in_features)
            return torch.cat([c, self.project(nothing.to(self.device))], 1)

    # --- decoder: condition -> image -------------------------------------------------------------
    def sigmas(self, S):
        """Noise levels of an S-step sampler: (S + 1,) float32 from 1 down to 0."""
        if S not in self.noise_levels:
            scheduler = copy.deepcopy(self.scheduler)           # set_timesteps changes it
            scheduler.set_timesteps(S)
            self.noise_levels[S] = scheduler.sigmas.float().tolist()
        return torch.tensor(self.noise_levels[S], device=self.device)

    def network(self, z, s, c):
        """The transformer alone: v (B, C, H, W) float32 at noise level s, () or (B,)."""
        dtype = self.decoder.dtype
        pooled = self.pooled.expand(len(z), -1)
        with self.autocast():
            output = self.decoder(hidden_states=z.to(dtype), timestep=1000 * s.expand(len(z)),
                                  encoder_hidden_states=c.to(dtype),
                                  pooled_projections=pooled.to(dtype), return_dict=False)
        return output[0].float()

    def velocity(self, z, s, c, negative=None, guidance=1.0):
        """v (B, C, H, W) at noise level s; with guidance v0 + guidance (v - v0).

        negative: the unconditional branch's condition (1, n, D), or where the velocity v0 under it
        is known already, v0 itself (B, C, H, W). No gradient passes through v0.
        """
        if guidance == 1.0:
            return self.network(z, s, c)
        if negative.dim() == 4:
            v = self.network(z, s, c)
            v0 = negative
        elif torch.is_grad_enabled():
            with torch.no_grad():
                v0 = self.network(z, s, negative.expand(len(z), -1, -1))
            v = self.network(z, s, c)
        else:
            v, v0 = self.branches(z, s, c, negative)
        return v0 + guidance * (v - v0)

    def branches(self, z, s, c, negative):
        """v and v0 (B, C, H, W), both branches of the guidance in one pass of 2B rows."""
        both = torch.cat([c, negative.expand(len(c), -1, -1)])
        s = s.expand(len(z)).repeat(2)
        return self.network(torch.cat([z, z]), s, both).chunk(2)

    def latent_shape(self):
        """(C, H, W) of a latent at config.resolution."""
        halvings = len(self.vae.config.block_out_channels) - 1
        side = self.config.resolution // 2 ** halvings
        return self.vae.config.latent_channels, side, side

    def draw(self, z, c, S, grad_steps=0):
        """ODE sampler: start noise z (B, C, H, W), condition c -> latent at s = 0.

        Gradients flow through the last grad_steps of the S steps.
        """
        sigmas = self.sigmas(S)
        negative = None
        if self.config.guidance != 1.0:
            negative = self.negative(0 if self.config.cond_len else c.shape[1])
        learning = torch.is_grad_enabled()
        for step in range(S):
            with torch.set_grad_enabled(learning and step >= S - grad_steps):
                v = self.velocity(z, sigmas[step], c, negative, self.config.guidance)
                z = z + (sigmas[step + 1] - sigmas[step]) * v
        return z

    @torch.no_grad()
    def draw_sde(self, z, c, S, noise, kind, noise_level, window, negative=None):
        """SDE sampler that records its log-probs.

        Steps in window = (begin, end) are stochastic, the others are steps of the ODE. noise
        (B, W, C, H, W): a standard normal per stochastic step. negative: `negative()`, if guided.
        Returns the latent at s = 0, and a dict of what an update needs: z, z_next, under guidance
        v0, each (B, W, C, H, W), and recorded, the log-probs (B, W).
        """
        sigmas = self.sigmas(S)
        guided = self.config.guidance != 1.0
        path = dict(z=[], z_next=[], recorded=[])
        if guided:
            path['v0'] = []
        begin, end = window
        for step in range(S):
            sigma = sigmas[step]
            sigma_next = sigmas[step + 1]
            if guided:
                v, v0 = self.branches(z, sigma, c, negative)
                v = v0 + self.config.guidance * (v - v0)
            else:
                v = self.network(z, sigma, c)
            if not begin <= step < end:
                z = sde_step(z, v, sigma, sigma_next, kind, 0.0, noise=torch.zeros_like(z))[0]
                continue
            z_next, logp, _, _ = sde_step(z, v, sigma, sigma_next, kind, noise_level,
                                          noise=noise[:, step - begin])
            path['z'].append(z)
            path['z_next'].append(z_next)
            path['recorded'].append(logp)
            if guided:
                path['v0'].append(v0)
            z = z_next
        return z, {name: torch.stack(steps, 1) for name, steps in path.items()}

    def step_logp(self, path, steps, c, S, kind, noise_level, begin, negative=None):
        """The update's log-prob of stored steps, all replayed in one pass of B*n rows.

        path: z, z_next of `draw_sde`; a v0 in it spares the unconditional branch while the
        weights are those of the rollout. steps: n indices into the window that starts at
        denoising step `begin`. Returns logp (B, n), mean (B, n, C, H, W), std (B, n, 1, 1, 1).
        """
        B, n = len(c), len(steps)
        z = path['z'][:, steps].flatten(0, 1)
        z_next = path['z_next'][:, steps].flatten(0, 1)
        if 'v0' in path:
            negative = path['v0'][:, steps].flatten(0, 1)
        sigmas = self.sigmas(S)
        at = torch.tensor(steps, device=self.device).repeat(B) + begin
        c = c.repeat_interleave(n, 0)
        v = self.velocity(z, sigmas[at], c, negative, self.config.guidance)
        _, logp, mean, std = sde_step(z, v, sigmas[at], sigmas[at + 1], kind, noise_level,
                                      z_next=z_next)
        return logp.view(B, n), mean.unflatten(0, (B, n)), std.unflatten(0, (B, n))

    def to_image(self, z):
        """Latent (B, C, H, W) -> image (B, 3, R, R) float32, about [-1, 1]; differentiable."""
        vae = self.vae.config
        z = z / vae.scaling_factor + (vae.shift_factor or 0)
        z = z.to(self.vae.dtype)
        parts = z.split(self.config.micro_batch or len(z))
        return torch.cat([self.vae.decode(part).sample.float() for part in parts])

    @torch.no_grad()
    def to_latent(self, x):
        """Image (B, 3, R, R) in [-1, 1] -> latent (B, C, H, W) float32, the posterior's mean."""
        vae = self.vae.config
        parts = x.to(self.vae.dtype).split(self.config.micro_batch or len(x))
        means = [self.vae.encode(part).latent_dist.mean.float() for part in parts]
        return (torch.cat(means) - (vae.shift_factor or 0)) * vae.scaling_factor
