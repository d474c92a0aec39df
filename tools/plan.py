"""What a stage needs on one GPU, said before anything is downloaded: `python STAGE.py --plan`.

The models are built from their published configurations on tensors without storage, and the
stage's own loss runs on them: what autograd saves for the backward pass is added up. So are the
floating-point operations of each network.
"""
import argparse
import json
import math
import os
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import common
import reward
from config import shared
from model import Projector, UAE

ALLOWANCE = 2.0         # GB: CUDA context, workspace of the kernels, logits in chunks, a rollout
CARDS = (24, 80)        # GB

# --- the published config.json of what the presets name -------------------------------------------
SD3 = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64,
           joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm='rms_norm')
SD3_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
               down_block_types=('DownEncoderBlock2D',) * 4,
               up_block_types=('UpDecoderBlock2D',) * 4, norm_num_groups=32, sample_size=1024,
               scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
               use_post_quant_conv=False)
QWEN_TEXT = dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008,
                 num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                 max_position_embeddings=128000, max_window_layers=70, rms_norm_eps=1e-6,
                 tie_word_embeddings=True, bos_token_id=151643, eos_token_id=151645,
                 rope_parameters=dict(rope_type='default', rope_theta=1e6,
                                      mrope_section=[16, 24, 24]))
QWEN_VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                   out_hidden_size=2048, patch_size=14, spatial_merge_size=2,
                   temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
                   tokens_per_second=2)
ARCHITECTURES = {
    'Qwen/Qwen2.5-VL-3B-Instruct': dict(
        text_config=QWEN_TEXT, vision_config=QWEN_VISION, image_token_id=151655,
        video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
        tie_word_embeddings=True),
    'stabilityai/stable-diffusion-3.5-medium': dict(
        transformer=dict(SD3, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
                         pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
        vae=SD3_VAE),
    'stabilityai/stable-diffusion-3.5-large': dict(
        transformer=dict(SD3, num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
                         pos_embed_max_size=192, dual_attention_layers=()),
        vae=SD3_VAE),
    'facebook/dinov2-large': dict(model_type='dinov2', hidden_size=1024, num_hidden_layers=24,
                                  num_attention_heads=16, patch_size=14, image_size=518),
}


def read_config(name, part='', file='config.json', known=ARCHITECTURES):
    """A model's configuration: of a local folder, or of `known`."""
    if name in known:
        return known[name][part] if part else known[name]
    try:
        with open(os.path.join(name, part, file)) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise SystemExit(f'--plan knows {", ".join(known)} and local folders, not {name!r}: '
                         f'{error}')


# --- models with random weights, or with none ----------------------------------------------------
def skeleton(config, device='cpu', known=ARCHITECTURES):
    """A UAE with random weights in the published sizes; on the device 'meta' without weights.

    known: {hub id: configuration}. Where the encoder is not a local folder, its prompts get the
    tiny tokenizer's ids.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    dtype = getattr(torch, config.dtype)
    local = os.path.isdir(config.encoder)
    source = shared['encoder']
    if local:
        source = config.encoder
    processor = common.load(AutoProcessor, source)
    with torch.device(device):
        encoder_config = Qwen2_5_VLConfig.from_dict(read_config(config.encoder, known=known))
        encoder = Qwen2_5_VLForConditionalGeneration(encoder_config).to(dtype)
        decoder_config = read_config(config.decoder, 'transformer', known=known)
        decoder = SD3Transformer2DModel.from_config(decoder_config).to(dtype)
        vae = AutoencoderKL.from_config(read_config(config.decoder, 'vae', known=known)).to(dtype)
        projector = Projector(encoder_config.text_config.hidden_size,
                              decoder.config.joint_attention_dim)
        if config.lora_rank:
            checkpoint.add_lora(encoder, config.lora_rank, checkpoint.ENCODER_LORA)
            checkpoint.add_lora(decoder, config.lora_rank, checkpoint.DECODER_LORA)
    # the tiny one's is zero, and then so is its gradient
    pooled = torch.full((1, decoder.config.pooled_projection_dim), float(config.decoder in known))
    if not local:
        pixels = processor.image_processor
        pixels.patch_size = encoder_config.vision_config.patch_size
        pixels.size = dict(shortest_edge=1, longest_edge=2 ** 30)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    uae = UAE(config, encoder, projector, decoder, vae, scheduler, processor, pooled, device)
    if device != 'meta':
        uae.to(device)
    return uae


def random_reward(config, device='cpu', known=ARCHITECTURES):
    """The tower of the key `reward`, or the weighted sum of several, with random weights."""
    parts = reward.reward_parts(config)
    towers = [random_tower(name, config, device, known) for name in parts]
    if len(towers) == 1:
        return towers[0]
    return reward.Mixture(towers, list(parts.values()))


def random_tower(name, config, device='cpu', known=ARCHITECTURES):
    """One backbone with random weights, in its published size."""
    library, source, preprocessing = reward.describe(name, config)
    with torch.device(device):
        if library == 'open_clip':
            import open_clip
            folder = source.removeprefix('local-dir:')
            if folder != source:
                model = read_config(folder, file='open_clip_config.json', known=known)['model_cfg']
            else:
                model = open_clip.get_model_config(source.split(':')[0])
            tower = open_clip.CLIP(**model).visual
        else:
            from transformers import AutoConfig, AutoModel
            model = AutoConfig.for_model(**read_config(source, known=known))
            tower = AutoModel.from_config(model)
    if library == 'open_clip':
        preprocessing = reward.clip_preprocessing(tower)
    return reward.Backbone(library, tower, preprocessing or reward.BACKBONES['dinov2'][2])


def prompt_tokens(uae):
    """Tokens of a caption prompt, the image's among them; about, where there is no tokenizer."""
    config, vision = uae.config, uae.encoder.config.vision_config
    side = round(config.resolution / vision.patch_size / vision.spatial_merge_size)
    if os.path.isdir(config.encoder):
        return side ** 2 + len(uae.before_image) + len(uae.after_image)
    return side ** 2 + len(config.caption_prompt.split()) * 4 // 3 + 21


def without_storage(modules):
    """Under FakeTensorMode: every weight and buffer as if on the CPU, with a size and no bytes."""
    twins = {}                                          # a tied weight stays one weight
    for module in modules:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in twins:
                        twin = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, torch.nn.Parameter):
                            twin = torch.nn.Parameter(twin, tensor.requires_grad)
                        twins[id(tensor)] = twin
                    tensors[name] = twins[id(tensor)]


# --- bytes ---------------------------------------------------------------------------------------
def storages(modules):
    """{address: storage} of every parameter and buffer of some modules."""
    found = {}
    for module in modules:
        for tensor in module.state_dict(keep_vars=True).values():
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage
    return found


def kept_by_autograd(uae, tower, loss, size):
    """Bytes that autograd keeps for the backward pass of one micro-batch, weights not counted."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    def give(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give), uae.autocast():
        end = uae(loss, tower, size, prompt_tokens(uae), uae.config)     # alive while we count
    own = storages([uae, tower])
    found = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    del end
    return found


class Peak(TorchDispatchMode):
    """Within this context, the most bytes that were alive at once of what was made in it.

    weights: {address: storage} of what was there before; a view of these is nothing new.
    """

    def __init__(self, weights):
        super().__init__()
        self.alive = 0
        self.most = 0
        self.seen = set(weights)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.seen.discard(key)
        self.alive -= size


@torch.no_grad()
def evaluation_peak(uae, tower):
    """Bytes that an evaluation of config.eval_batch images holds at most, weights not counted.

    The caption's cache is the larger of the captioner's needs, and the drawing runs by micro_batch.
    """
    config, text = uae.config, uae.encoder.config.text_config
    heads = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    tokens = prompt_tokens(uae) + config.caption_len
    numbers = 2 * tokens * text.num_hidden_layers * heads       # keys and values of a caption
    cache = config.eval_batch * numbers * uae.encoder.dtype.itemsize
    z = torch.zeros(config.eval_batch, *uae.latent_shape())
    y = torch.zeros(config.eval_batch, config.caption_len, dtype=torch.long)
    with Peak(storages([uae, tower])) as peak, uae.autocast():
        cond = uae.text_condition(y, torch.ones(y.shape))
        neg = cond[:1]
        uae.velocity(z, torch.zeros(()), cond, neg, config.guidance)
        tower.features(uae.to_image(z))
    return max(cache, peak.most)


def gigabytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors) / 1e9


def row_of(module, with_reference):
    """A part's line of the plan: parameters and bytes of all that belongs to it."""
    own = [p for name, p in module.named_parameters() if 'lora_' not in name]
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = gigabytes(trained)
    return dict(parameters=sum(p.numel() for p in own),
                weights=gigabytes([*module.parameters(), *module.buffers()]),
                trained=sum(p.numel() for p in trained),
                gradients=gradients, adamw=2 * gradients,
                reference=gradients if with_reference else 0.0)


def text_encoder_row(uae):
    """The plan's line of a text encoder that stands still.

    It shares with the captioner what no stage trains, and keeps the rest as float32: with LoRA
    adapters of its own, else a whole language model.
    """
    own = dict(uae.language_model.named_parameters())
    if uae.config.lora_rank:
        own = {name: p for name, p in own.items() if 'lora_' in name}
    count = sum(p.numel() for p in own.values())
    return dict(parameters=count, weights=4 * count / 1e9, trained=0, gradients=0.0, adamw=0.0,
                reference=0.0)


# --- operations ----------------------------------------------------------------------------------
def attention_flops(q, k, *others, **unused):
    """Scores and their mixture of values: a matrix product each, of every query head."""
    return 2 * (2 * math.prod(q) * k[2])


def attention_backward_flops(gradient, q, k, *others, **unused):
    """The scores again, and two products for each of the forward pass."""
    return 5 * (2 * math.prod(q) * k[2])


def flop_counter():
    """torch's counter, which knows attention on GPUs but takes that of a CPU for nothing."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {forward: attention_flops, backward: attention_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=formulas)


@torch.no_grad()
def forward_flops(uae, tower):
    """{network: floating-point operations} of one sample's forward pass, under FakeTensorMode.

    Matrix products, convolutions and attention. A condition is cond_len tokens long, a caption
    caption_len behind its prompt.
    """
    y = torch.zeros(1, uae.config.caption_len, dtype=torch.long)
    z = torch.zeros(1, *uae.latent_shape())
    cond = uae.text_condition(y, torch.ones(y.shape))
    x = uae.to_image(z)
    length = prompt_tokens(uae)
    embedded = torch.zeros(1, length, uae.encoder.config.text_config.hidden_size)
    positions = torch.zeros(3, 1, length, dtype=torch.long)
    calls = {
        'a caption after its image': (uae.states_after, embedded, positions, y),
        'caption to condition': (uae.text_condition, y, torch.ones(y.shape)),
        'denoising step': (uae.network, z, torch.zeros(()), cond),
        'latent to image': (uae.to_image, z),
        'image to latent': (uae.to_latent, x),
        'reward': (tower.features, x),
    }
    found = {}
    for name, (call, *args) in calls.items():
        with flop_counter() as counter, uae.autocast():
            call(*args)
        found[name] = counter.get_total_flops()
    return found


def planned_config(config):
    """The configuration as the plan runs it: every wiring as a text of the same length."""
    config = argparse.Namespace(**vars(config))
    if config.condition == 'text+image':
        config.cond_len = 2 * config.cond_len
    config.condition = 'text'
    return config


# --- the plan ------------------------------------------------------------------------------------
def plan(config, trained, loss):
    """Prints weights, gradients, optimizer and activations of a stage; returns them as a dict.

    trained: the parts that it trains; loss(uae, tower, size, prompt_len, c): its loss on zeros.
    """
    common.quiet()
    world = int(os.environ.get('WORLD_SIZE', 1))
    samples = getattr(config, 'batch', 0) or config.prompts * getattr(config, 'group', 1)
    size = min(samples // world, config.micro_batch or samples)
    uae = skeleton(planned_config(config), 'meta')
    checkpoint.check_sizes(uae)
    tower = random_reward(config, 'meta')
    judge = random_tower('judge', config, 'meta')
    uae.train_only(*trained)
    uae.recompute_activations()
    rows = {}
    for name in ('encoder', 'projector', 'decoder', 'vae'):
        rows[name] = row_of(getattr(uae, name), name in trained and getattr(config, 'kl', 0))
    rows['reward'] = row_of(tower, False)
    rows['judge'] = row_of(judge, False)
    if config.text_encoder == 'start':
        rows['text_encoder'] = text_encoder_row(uae)
    kept = {}
    uae.sigmas(config.sample_steps)             # remembered: FakeTensorMode cannot make them
    with FakeTensorMode():
        without_storage([uae, tower])
        uae.device = torch.device('cpu')
        evaluation = evaluation_peak(uae, tower) / 1e9
        flops = forward_flops(uae, tower)
        uae.config.checkpointing = True
        kept[True] = kept_by_autograd(uae, tower, loss, size)
        uae.config.checkpointing = False
        uae.decoder.disable_gradient_checkpointing()
        kept[False] = kept_by_autograd(uae, tower, loss, size)
    layers = dict(encoder=uae.encoder.config.text_config.num_hidden_layers,
                  decoder=uae.decoder.config.num_layers)
    blocks = min(layers[part] for part in trained if part in layers)
    block = (kept[False] - kept[True]) / blocks / 1e9           # recomputed one at a time
    fixed = sum(row[key] for row in rows.values()
                for key in ('weights', 'gradients', 'adamw', 'reference'))
    activations = {True: kept[True] / 1e9 + block, False: kept[False] / 1e9}
    total = {key: fixed + max(value, evaluation) for key, value in activations.items()}
    print_plan(config, world, rows, size, kept, block, evaluation, total)
    counts = [f'{name} {count / 1e12:.3g}' for name, count in flops.items()]
    print('TFLOP of a forward pass:', ', '.join(counts))
    return dict(rows, kept=kept, total=total, evaluation=evaluation, flops=flops, B=size)


def print_plan(config, world, rows, size, kept, block, evaluation, total):
    print(f'memory of one GPU of {world} in GB = 1e9 bytes, preset {config.preset}')
    print(f'{"":12s} parameters   weights   trained  gradients   AdamW  reference')
    for name, row in rows.items():
        print(f'{name:12s} {row["parameters"] / 1e9:8.4f} B {row["weights"]:9.3f} '
              f'{row["trained"] / 1e6:7.2f} M {row["gradients"]:10.3f} {row["adamw"]:7.3f} '
              f'{row["reference"]:10.3f}')
    print(f'activations of a micro-batch of {size}: {kept[True] / 1e9:.3f} kept + {block:.3f} of '
          f'one recomputed block with checkpointing, {kept[False] / 1e9:.3f} without')
    print(f'evaluation of {config.eval_batch} images at a time: {evaluation:.3f}')
    for key, word in ((True, 'with   '), (False, 'without')):
        verdicts = []
        for card in CARDS:
            fits = total[key] + ALLOWANCE < card
            verdicts.append(f'{"fits" if fits else "does not fit"} {card} GB')
        ours = ' (this run)' if key == config.checkpointing else ''
        print(f'total {word} checkpointing: {total[key]:.2f} + {ALLOWANCE} for CUDA and the '
              f'rollout: {", ".join(verdicts)}{ours}')
