"""UAE: encoder, projector and decoder as one auto-encoder, and what of it a stage trains.

    x --encoder--> y ~ pi_phi(y | x) --encoder--> h_T --projector--> c = g(h_T) --decoder--> x_hat

Shape alphabet, the same in every file:
    P images per rank   G group   B = P*G   T caption tokens   V vocabulary   L prompt tokens
    S denoising steps   M noisy ones   n trained ones   (C, H, W) latent   R resolution
    d encoder width   D condition width   N image tokens
    x image (P, 3, R, R) in [-1, 1]   vision: what the vision tower makes of it, P rows
    y caption tokens (B, T)   mask (B, T), 1 where y was sampled, end token included
    c condition (B, cond_len, D)   z latent (B, C, H, W)   x_hat reconstruction
    r reward (P, G)   logp, old_logp, ref_logp log-probs   s noise level   v velocity
In the tiny world d = D = 128, cond_len 28, T = 24, N = 16, z 4x8x8; at full size d = 2048,
D = 4096, cond_len 512, T = 384, N = 324, z 16x64x64.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


class Projector(nn.Module):
    """g: last-layer hidden states (B, L, d) -> condition (B, L, D), two linear layers."""

    def __init__(self, d, D):
        super().__init__()
        self.up = nn.Linear(d, 2 * D)
        self.down = nn.Linear(2 * D, D)

    def forward(self, states):
        return self.down(F.gelu(self.up(states)))


class UAE(nn.Module):
    """Encoder, projector and decoder; `lib.checkpoint.open_uae` loads them."""

    def __init__(self, config, encoder, projector, decoder):
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.projector = projector
        self.decoder = decoder
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self):
        return self.encoder.device

    def forward(self, loss, *args, **kwargs):
        """loss(self, ...): DistributedDataParallel has to see the forward pass of all parts."""
        return loss(self, *args, **kwargs)

    # --- condition: caption -> c -----------------------------------------------------------------
    def condition(self, y, mask, vision=None):
        """c for captions y (B, T), by config.condition: how the decoder is wired to the encoder.

        text         the caption re-encoded alone (default)
        answer       projected states at the caption's positions after the image: the paper's h_T
        image        projected states at the image's positions
        text+image   both, concatenated: c = {c_text, c_img} of the paper's stage 3
        `vision`, P images of B = P*G captions, is needed by all but `text`. Differentiable.
        Returns (B, cond_len, D), twice as long for text+image.
        """
        kind = self.config.condition
        if kind == 'answer':
            with self.encoder.autocast():
                h_T = self.encoder.caption_states(vision, y)[:, 1:]     # state t + 1 has read y_t
            h_T = h_T * self.encoder.words(y, mask)[..., None]
            return self.project(self.pad(h_T))
        if kind in ('text', 'text+image'):
            h_T = self.encoder.text_states(y, mask)
            c_text = self.project(h_T)
            if kind == 'text':
                return c_text
        c_img = self.project(self.pad(self.encoder.image_states(vision)))
        c_img = c_img.repeat_interleave(len(y) // len(c_img), 0)
        if kind == 'image':
            return c_img
        return torch.cat([c_text, c_img], 1)

    def project(self, states):
        """g(states): (B, L, d) -> (B, L, D), in the projector's own precision."""
        with self.encoder.autocast():
            return self.projector(states.to(self.projector.up.weight.dtype))

    def pad(self, states):
        """(B, n, d) -> (B, cond_len, d), zeros on the right; as it is where cond_len is 0."""
        if not self.config.cond_len:
            return states
        states = states[:, :self.config.cond_len]
        return F.pad(states, (0, 0, 0, self.config.cond_len - states.shape[1]))

    @torch.no_grad()
    def negative(self, width=0):
        """The unconditional branch's condition (1, cond_len, D), the negative prompt's.

        As long as what `condition` returns; width: that length where cond_len is 0.
        """
        y, mask, _ = self.encoder.tokens([self.config.negative_prompt])
        if self.config.cond_len:
            width = 0
        c = self.project(self.encoder.text_states(y, mask, width))
        if self.config.condition != 'text+image':
            return c
        nothing = torch.zeros(1, c.shape[1], self.encoder.width, device=self.device)
        return torch.cat([c, self.project(nothing)], 1)

    def draw(self, z, c, S, grad_steps=0):
        """Start noise z (B, C, H, W), condition c -> images (B, 3, R, R), by the ODE."""
        negative = None
        if self.config.guidance != 1.0:
            negative = self.negative(c.shape[1])
        return self.decoder.to_image(self.decoder.draw(z, c, S, negative, grad_steps))

    # --- what a stage trains ---------------------------------------------------------------------
    def train_only(self, *names):
        """Marks what a stage trains and returns those parameters, float32 masters.

        names: of 'encoder' (the language model, never the vision tower; lm_head moves where it is
        the embedding's own matrix, as in the tiny world), 'projector', 'decoder' (the transformer,
        never the VAE). With LoRA only the adapters. Everything else is frozen, in config.dtype.
        """
        parts = dict(encoder=self.encoder.language_model, projector=self.projector,
                     decoder=self.decoder.transformer)
        for name in names:
            for key, p in parts[name].named_parameters():
                if self.config.lora_rank and name != 'projector' and 'lora_' not in key:
                    continue
                if name == 'decoder' and self.decoder.unreachable(key):
                    continue
                p.data = p.data.float()
                p.requires_grad_(True)
        for module in (self.encoder.vlm, self.decoder.transformer):
            for key, p in module.named_parameters():
                # adapters stay float32 also in a stage that freezes them: the next one trains on
                if not p.requires_grad and 'lora_' not in key:
                    p.data = p.data.to(getattr(torch, self.config.dtype))
        if self.config.checkpointing:
            self.recompute_activations()
        return [p for p in self.parameters() if p.requires_grad]

    def recompute_activations(self):
        """Gradient checkpointing of both transformers; it is at work between train() and eval().

        transformers 5 has two names for it.
        """
        vlm = self.encoder.vlm
        if hasattr(vlm, 'activation_checkpointing_enable'):
            vlm.activation_checkpointing_enable()
        else:
            vlm.gradient_checkpointing_enable()
        # it asks for gradients of every embedding too: useless work through a frozen encoder
        vlm.disable_input_require_grads()
        self.decoder.transformer.enable_gradient_checkpointing()

    def reference(self, *names):
        """A UAE that shares all but these parts, which are frozen as they are."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        for name in names:
            twin._modules[name] = frozen_copy(getattr(self, name))
        return twin


def frozen_copy(module, own=None):
    """A frozen copy of a module that shares its buffers and all other weights than its own.

    own: their names; None = what is trained: with LoRA the adapters alone.
    """
    if own is None:
        own = [name for name, p in module.named_parameters() if p.requires_grad]
    shared = {id(p): p for name, p in module.named_parameters() if name not in own}
    shared.update({id(buffer): buffer for buffer in module.buffers()})
    for name, value in vars(module).items():
        if not name.startswith('_'):            # no weights: config, processor, schedule
            shared[id(value)] = value
    twin = copy.deepcopy(module, shared)
    return twin.requires_grad_(False)
