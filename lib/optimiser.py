"""AdamW as every stage uses it: a learning rate by schedule, clipped gradients, bad steps left out.
"""
import math

import torch

GRAD_CLIP = 1.0             # largest gradient norm; a usual value, and no run here needed another
PATIENCE = 5                # steps in a row with a non-finite gradient that end the run


def lr_at(step, config):
    """Learning rate of an update: linear warm-up over config.warmup updates, then a cosine.

    The cosine reaches 0 at update lr_decay * steps; without lr_decay the rate is constant.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if not config.lr_decay:
        return config.lr
    length = max(1, config.lr_decay * config.steps - config.warmup)
    done = min(1, (step - config.warmup) / length)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class Optimiser:
    """AdamW at the scheduled learning rate on clipped gradients.

    A step with a non-finite gradient changes nothing; PATIENCE of these in a row end the run.
    Gradients are synchronised, so all ranks agree on it.
    """

    def __init__(self, params, config, betas=(0.9, 0.999), weight_decay=0.0):
        self.params = params
        self.config = config
        self.adamw = torch.optim.AdamW(params, lr=config.lr, betas=betas, weight_decay=weight_decay,
                                       fused=True)
        self.bad_steps = 0          # with a non-finite gradient, in a row so far

    def step(self, step):
        """One update -> log fields grad_norm (before clipping, -1 if bad), lr, bad_steps."""
        lr = lr_at(step, self.config)
        for group in self.adamw.param_groups:
            group['lr'] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.params, GRAD_CLIP).item()
        if math.isfinite(norm):
            self.bad_steps = 0
            self.adamw.step()
        else:
            norm = -1.0
            self.bad_steps += 1
        self.adamw.zero_grad(set_to_none=True)
        if self.bad_steps >= PATIENCE:
            raise SystemExit(f'{self.bad_steps} steps in a row with a non-finite gradient, the '
                             f'last one {step}; checkpoints of before are in {self.config.out_dir}')
        return dict(grad_norm=norm, lr=lr, bad_steps=self.bad_steps)
