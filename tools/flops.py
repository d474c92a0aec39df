"""Floating-point operations of matrix products, convolutions and attention."""
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from reward import Backbone


def attention_flops(q, k, *others, **unused):
    """Scores and their mixture of values: a matrix product each, of every query head."""
    return 2 * (2 * math.prod(q) * k[2])


def attention_backward_flops(gradient, q, k, *others, **unused):
    """The scores again, and two products for each of the forward pass."""
    return 5 * (2 * math.prod(q) * k[2])


def flop_counter():
    """torch's counter, which takes a CPU's attention for nothing, and before torch 2.14 refuses a
    GPU's where several query heads share a key head."""
    formulas = {}
    for kind in ('flash_attention_for_cpu', 'flash_attention', 'efficient_attention',
                 'cudnn_attention'):
        name = f'_scaled_dot_product_{kind}'
        formulas[getattr(torch.ops.aten, name)] = attention_flops
        formulas[getattr(torch.ops.aten, f'{name}_backward')] = attention_backward_flops
    return FlopCounterMode(display=False, custom_mapping=formulas)


@torch.no_grad()
def forward_flops(uae, tower):
    """{network: operations} of one sample's forward pass; tower: the `Reward`.

    A condition is cond_len tokens long, a caption caption_len behind its prompt.
    """
    y = torch.zeros(1, uae.config.caption_len, dtype=torch.long)
    mask = torch.ones(y.shape)
    x = torch.zeros(1, 3, uae.config.resolution, uae.config.resolution)
    z = torch.zeros(1, *uae.decoder.latent_shape())
    prompt = uae.encoder.prompt(uae.encoder.see(x))

    def condition():
        return uae.project(uae.encoder.text_states(y, mask))

    calls = {
        'a caption after its image': (uae.encoder.states_after, *prompt, y),
        'caption to condition': (condition,),
        'denoising step': (uae.decoder.network, z, torch.zeros(1), condition()),
        'latent to image': (uae.decoder.to_image, z),
        'image to latent': (uae.decoder.to_latent, x),
    }
    for one in tower.towers:
        if isinstance(one, Backbone):
            calls['reward'] = one.features, x
    found = {}
    for name, (call, *args) in calls.items():
        with flop_counter() as counter, uae.encoder.autocast():
            call(*args)
        found[name] = counter.get_total_flops()
    return found
