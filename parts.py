"""Which parts of the model a stage trains, in which precision, and where the idle ones wait.

`UAE` in model.py is a `Parts`: encoder, projector, decoder and vae are its modules, config its
keys. Nothing here knows what the parts compute.
"""
import copy
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn


def frozen_copy(module):
    """A frozen copy of a module that shares every weight which is not trained.

    With LoRA only the adapters are copied, in full fine-tuning everything that is trained.
    """
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    twin = copy.deepcopy(module, shared)
    return twin.requires_grad_(False)


class Parts(nn.Module):
    """Training, precision and memory of a model with encoder, projector, decoder and vae."""

    @property
    def language_model(self):
        return self.encoder.model.language_model

    def train_only(self, *names):
        """Marks what a stage trains and returns those parameters, float32 masters.

        names: of 'encoder' (the language model without lm_head, but where that is tied to the
        embedding both move; never the vision tower), 'projector', 'decoder' (the transformer,
        never the VAE). With LoRA only the adapters. Everything else is frozen, in config.dtype.
        """
        parts = dict(encoder=self.language_model, projector=self.projector, decoder=self.decoder)
        for name in names:
            for key, p in parts[name].named_parameters():
                adapted = self.config.lora_rank and name != 'projector'
                if adapted and 'lora_' not in key:
                    continue
                if name == 'decoder' and self.unreachable(key):
                    continue
                p.data = p.data.float()
                p.requires_grad_(True)
        for module in (self.encoder, self.decoder):
            for key, p in module.named_parameters():
                # adapters stay float32 also in a stage that freezes them: the next one trains on
                if not p.requires_grad and 'lora_' not in key:
                    p.data = p.data.to(getattr(torch, self.config.dtype))
        if self.config.checkpointing:
            self.recompute_activations()
        return [p for p in self.parameters() if p.requires_grad]

    def recompute_activations(self):
        """Gradient checkpointing of both transformers; transformers 5 has two names for it."""
        if hasattr(self.encoder, 'activation_checkpointing_enable'):
            self.encoder.activation_checkpointing_enable()
        else:
            self.encoder.gradient_checkpointing_enable()
        # it asks for gradients of every embedding too: useless work through a frozen encoder
        self.encoder.disable_input_require_grads()
        self.decoder.enable_gradient_checkpointing()

    def compile_decoder(self):
        """Compiles each transformer block by itself, once for blocks of a kind and all sizes."""
        for block in self.decoder.transformer_blocks:
            block.compile(dynamic=True)

    def unreachable(self, key):
        """Whether no loss reaches this decoder parameter.

        The last block drops what text queries attend to; the tiny pooled embedding is zero.
        """
        last = f'transformer_blocks.{self.decoder.config.num_layers - 1}.attn.'
        if key.startswith((last + 'add_q', last + 'norm_added_q')):
            return True
        return 'text_embedder.linear_1.w' in key and not self.pooled.any()

    def forward(self, loss, *args, **kwargs):
        """loss(self, ...) of a stage: the door through which DistributedDataParallel sees it."""
        if not self.config.checkpointing:
            return loss(self, *args, **kwargs)
        towers = (self.language_model, self.decoder)
        for tower in towers:        # libraries recompute in train mode only; nothing has dropout
            tower.train()
        try:
            return loss(self, *args, **kwargs)
        finally:
            for tower in towers:
                tower.eval()

    @contextmanager
    def parked(self, *names):
        """Context in which the parts named ('encoder', 'decoder', 'vae') wait on the CPU."""
        parts = [getattr(self, name) for name in names]
        if 'encoder' in names and self.text_encoder:
            parts.append(self.text_encoder)
        for part in parts:
            part.to('cpu')
        try:
            yield
        finally:
            for part in parts:
                part.to(self.device)

    def autocast(self):
        """Matrix work in config.dtype over float32 master weights; nothing to do in float32."""
        if self.config.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.dtype))

    def reference(self, name):
        """A UAE that shares all but one part, which is frozen as it is: the reference policy."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin._modules[name] = frozen_copy(getattr(self, name))
        return twin
