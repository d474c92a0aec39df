"""The tiny base models of the embedded world, trained from nothing on a CPU (`make base`).

    python data/shapes/pretrain.py      # all parts; docs/log.md has the seconds
    python data/shapes/pretrain.py --parts=vae,clip --out_dir=out/base --seed=2

Parts, in order; each reads what the earlier ones wrote:
    vae       AutoencoderKL, 3x32x32 -> 4x8x8
    clip      open_clip CLIP, contrastive on (image, caption) with near-miss negatives: the reward
    judge     ConvNeXt, contrastive on images alone, never seen by any training of the loop
    encoder   Qwen2.5-VL that captions scenes, with its tokenizer and processor
    decoder   SD3 transformer and projector, by pretrain_decoder.py (stage 0), while the captioner
              learns to be brief
A base whose images are words, for reca.py (`make reca`); it starts from the shipped one:
    terse     a new decoder and projector, which see brief captions alone
    tower     the vision tower is pulled to the words of what it sees
    reader    the language model learns to caption through it, its states of texts held
Scenes are drawn on the fly and never from the held-out set.
"""
import json
import os
import shutil
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from config import parse
from data.shapes import scenes as world

# --- script keys ---------------------------------------------------------------------------------
keys = dict(
    parts = 'vae,clip,judge,encoder,decoder',    # which to train, comma-separated
    vae_steps = 900,           # batches of 32
    clip_steps = 500,          # batches of 96, half of them near misses of the other half
    judge_steps = 400,         # the same
    encoder_steps = 800,       # batches of 64 full captions
    decoder_steps = 750,       # batches of 64, stage 0; more leave stage 3 less to do
    settle_steps = 250,        # then as many while the learning rate falls to 0
    decoder_images = 32768,    # distinct scenes it draws them from
    full_share = 0.75,         # of the decoder's conditions are full captions, the others terse
    terse_steps = 1000,        # batches of 32 brief captions
    tower_steps = 800,         # batches of 32; fewer leave images less like words
    reader_steps = 1500,       # batches of 32 brief captions; after 400 its own are 75 % true
    most_phrases = 0,          # most phrases of a caption the captioner is ever taught; 0 = all
)
least_one = ('vae_steps', 'clip_steps', 'judge_steps', 'encoder_steps', 'decoder_steps',
             'decoder_images')
limits = dict(dict.fromkeys(least_one, (1, 1e9)), full_share=(0, 1))
# -------------------------------------------------------------------------------------------------


def fresh_scenes(rng, n, avoid):
    """n random scenes, none of them in the set `avoid` (the held-out ones)."""
    found = []
    while len(found) < n:
        scene = world.random_scene(rng)
        if scene not in avoid:
            found.append(scene)
    return found


def mutant(scene, rng):
    """A near miss: one attribute changed, one object moved, or another background."""
    objects = list(scene.objects)
    kind = rng.choice(['size', 'colour', 'shape', 'cell', 'background'])
    if kind == 'background':
        others = [b for b in world.BACKGROUNDS if b != scene.background]
        return scene._replace(background=rng.choice(others))
    i = rng.integers(len(objects))
    taken = {getattr(objects[i], kind)}
    if kind == 'cell':
        taken = {thing.cell for thing in objects}
    free = [value for value in world.VALUES[kind] if value not in taken]
    if not free:
        return mutant(scene, rng)
    objects[i] = objects[i]._replace(**{kind: str(rng.choice(free))})
    objects.sort(key=lambda thing: world.CELLS.index(thing.cell))
    return scene._replace(objects=tuple(objects))


def contrastive_batch(rng, n, avoid):
    """n scenes, the second half near misses of the first."""
    half = fresh_scenes(rng, n // 2, avoid)
    return half + [mutant(s, rng) for s in half]


def train(name, params, steps, lr, loss_fn, warmup=0.05):
    """Adam with a one-cycle learning rate; loss_fn() -> (loss, {name: number})."""
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=warmup)
    bar = tqdm(range(steps), desc=name, mininterval=2)
    mean = {}
    for _ in bar:
        loss, stats = loss_fn()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        sched.step()
        for k, v in dict(loss=loss.item(), **stats).items():
            mean[k] = 0.95 * mean.get(k, v) + 0.05 * v
        bar.set_postfix({k: f'{v:.4f}' for k, v in mean.items()}, refresh=False)


def pixels(scenes):
    return torch.from_numpy(world.pixels(scenes))


# --- vae -----------------------------------------------------------------------------------------
def pretrain_vae(config, avoid):
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    rng = np.random.default_rng(config.seed)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 24, 48),
        layers_per_block=1, down_block_types=('DownEncoderBlock2D',) * 3,
        up_block_types=('UpDecoderBlock2D',) * 3, norm_num_groups=8, sample_size=32,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0)

    def loss_fn():
        x = pixels(fresh_scenes(rng, 32, avoid))
        posterior = vae.encode(x).latent_dist
        d = vae.decode(posterior.sample()).sample - x
        mse = d.square().mean()
        loss = mse + 0.3 * d.abs().mean() + 1e-5 * posterior.kl().mean()
        return loss, dict(mse=mse.item())

    train('vae', list(vae.parameters()), config.vae_steps, 3e-3, loss_fn)
    vae.eval()
    # the latents' own scale, so that the decoder sees unit variance
    with torch.no_grad():
        z = vae.encode(pixels(fresh_scenes(rng, 512, avoid))).latent_dist.mean
    vae.register_to_config(shift_factor=round(z.mean().item(), 4),
                           scaling_factor=round(1 / z.std().item(), 4))
    vae.half().save_pretrained(f'{config.out_dir}/decoder/vae')
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(f'{config.out_dir}/decoder/scheduler')


# --- clip: image and caption ---------------------------------------------------------------------
def pretrain_clip(config, avoid):
    import open_clip
    rng = np.random.default_rng(config.seed + 1)
    torch.manual_seed(config.seed + 1)
    model_cfg = dict(
        embed_dim=64,
        vision_cfg=dict(image_size=32, layers=3, width=96, head_width=32, patch_size=4),
        text_cfg=dict(context_length=32, vocab_size=64, width=96, heads=3, layers=2))
    clip = open_clip.CLIP(**model_cfg)
    index = {word: i + 1 for i, word in enumerate(world.WORDS)}
    end = len(index) + 1            # open_clip reads the text feature at the largest token id

    def loss_fn():
        batch = contrastive_batch(rng, 96, avoid)
        text = torch.zeros(96, 32, dtype=torch.long)
        for i, scene in enumerate(batch):
            ids = [index[word] for word in world.caption(scene).split()] + [end]
            text[i, :len(ids)] = torch.tensor(ids)
        x = pixels(batch) + 0.05 * torch.randn(96, 3, 32, 32)
        f, g, scale = clip(x, text)
        logits = scale * f @ g.T
        target = torch.arange(96)
        hits = (logits.argmax(1) == target).float().mean().item()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, dict(hits=hits)

    train('clip', list(clip.parameters()), config.clip_steps, 1.5e-3, loss_fn)
    os.makedirs(f'{config.out_dir}/clip', exist_ok=True)
    half = dict(mean=[0.5] * 3, std=[0.5] * 3)
    with open(f'{config.out_dir}/clip/open_clip_config.json', 'w') as f:
        json.dump(dict(model_cfg=model_cfg, preprocess_cfg=half), f, indent=1)
    save_half(clip, f'{config.out_dir}/clip/open_clip_model.safetensors')


def save_half(module, path):
    from safetensors.torch import save_file
    state = {}
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor = tensor.half().contiguous()
        state[name] = tensor
    save_file(state, path)


# --- judge: images alone -------------------------------------------------------------------------
def pretrain_judge(config, avoid):
    from transformers import ConvNextConfig, ConvNextModel
    rng = np.random.default_rng(config.seed + 2)
    torch.manual_seed(config.seed + 2)
    judge = ConvNextModel(ConvNextConfig(image_size=32, patch_size=4, num_stages=2,
                                         hidden_sizes=[64, 128], depths=[2, 2]))

    def view(x):
        """What must not matter: noise and a little light."""
        gain = 1 + 0.1 * torch.randn(len(x), 1, 1, 1)
        noise = 0.1 * torch.randn_like(x) * torch.rand(len(x), 1, 1, 1)
        light = 0.05 * torch.randn(len(x), 1, 1, 1)
        return x * gain + noise + light

    def loss_fn():
        x = pixels(contrastive_batch(rng, 96, avoid))
        f = F.normalize(judge(torch.cat([view(x), view(x)])).pooler_output, dim=-1)
        logits = f[:96] @ f[96:].T / 0.07
        target = torch.arange(96)
        hits = (logits.argmax(1) == target).float().mean().item()
        other = (logits.mean() * 0.07).item()
        return F.cross_entropy(logits, target), dict(hits=hits, other=other)

    train('judge', list(judge.parameters()), config.judge_steps, 1e-3, loss_fn)
    judge.half().save_pretrained(f'{config.out_dir}/judge')
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, size=dict(height=32, width=32))
    with open(f'{config.out_dir}/judge/preprocessor_config.json', 'w') as f:
        json.dump(half, f, indent=1)


# --- encoder: tokenizer, processor, captioner ----------------------------------------------------
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>',
           '<|image_pad|>', '<|video_pad|>', '<unk>']
TEMPLATE_WORDS = ['user', 'assistant', 'generate', 'system', 'describe', 'the', 'image', 'random']
# Qwen's chat template without its default system turn, words separated by blanks
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
    "<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}")


def save_processor(folder):
    """Word-level tokenizer, one token a word, and Qwen's image processor with 4-pixel patches."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor,
                              Qwen2VLVideoProcessor)
    words = dict.fromkeys([*SPECIAL, *world.WORDS, *TEMPLATE_WORDS])        # distinct, in order
    vocab = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token='<unk>', pad_token='<|endoftext|>', eos_token='<|im_end|>',
        additional_special_tokens=SPECIAL[1:2] + SPECIAL[3:7], clean_up_tokenization_spaces=False)
    patches = dict(
        patch_size=4, merge_size=2, temporal_patch_size=2,
        size=dict(shortest_edge=256, longest_edge=64 * 64), image_mean=[0.5] * 3,
        image_std=[0.5] * 3)
    images = Qwen2VLImageProcessor(**patches)
    videos = Qwen2VLVideoProcessor(**patches)
    Qwen2_5_VLProcessor(images, tokenizer, videos, CHAT_TEMPLATE).save_pretrained(folder)
    return vocab


def new_encoder(config):
    """A random encoder beside the trained VAE: every script can load it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    vocab = save_processor(f'{config.out_dir}/encoder')
    ids = dict(
        image_token_id=vocab['<|image_pad|>'], video_token_id=vocab['<|video_pad|>'],
        vision_start_token_id=vocab['<|vision_start|>'],
        vision_end_token_id=vocab['<|vision_end|>'])
    text = dict(
        vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=vocab['<|endoftext|>'], eos_token_id=vocab['<|im_end|>'],
        pad_token_id=vocab['<|endoftext|>'],
        rope_parameters=dict(rope_type='default', rope_theta=10000.0, mrope_section=[4, 6, 6]))
    vision = dict(
        depth=2, hidden_size=96, intermediate_size=256, num_heads=3, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2, window_size=32, out_hidden_size=128,
        fullatt_block_indexes=[0, 1])
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
    encoder.save_pretrained(f'{config.out_dir}/encoder')


def new_decoder(config):
    """The same for decoder and projector."""
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import save_file
    from model import Projector
    decoder = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=128,
        caption_projection_dim=128, pooled_projection_dim=32, pos_embed_max_size=8,
        qk_norm='rms_norm')
    decoder.save_pretrained(f'{config.out_dir}/decoder/transformer')
    save_file(Projector(128, 128).state_dict(), f'{config.out_dir}/projector.safetensors')


def few(text, most, rng):
    """The caption with at most `most` of its phrases, drawn at random, left in order; 0 = all."""
    phrases = text.removesuffix(' .').split(' , ')
    if not most or len(phrases) <= most:
        return text
    kept = sorted(rng.choice(len(phrases), most, replace=False))
    return ' , '.join(phrases[i] for i in kept) + ' .'


def watch(uae, scenes):
    """`Encoder.see` without its no_grad: here the tower learns."""
    return uae.encoder.see.__wrapped__(uae.encoder, pixels(scenes))


def pretrain_encoder(config, avoid):
    """Full captions first (without most_phrases): all that the captioner can know of a scene."""
    from lib.checkpoint import open_uae
    torch.manual_seed(config.seed + 3)
    rng = np.random.default_rng(config.seed + 3)
    new_encoder(config)
    new_decoder(config)
    uae = open_uae(config)
    params = list(uae.encoder.vlm.parameters())
    for p in params:
        p.requires_grad_(True)

    def loss_fn():
        scenes = fresh_scenes(rng, 64, avoid)
        captions = [few(world.caption(scene), config.most_phrases, rng) for scene in scenes]
        y, mask, _ = uae.encoder.tokens(captions)
        logp = uae.encoder.logp(watch(uae, scenes), y)
        return -(logp * mask).sum() / mask.sum(), {}

    train('encoder', params, config.encoder_steps, 3e-3, loss_fn)
    uae.encoder.vlm.save_pretrained(f'{config.out_dir}/encoder')


def brief(scene, rng):
    """How the captioner is taught to speak: of the first object or two, leaving attributes out.

    Sampled captions then hold a quarter of the facts, and the likeliest caption is not the full
    one: reinforcement learning has something to bring back, by sampling and by search alike.
    Objects are told in reading order from the first: told at random, a three-layer language model
    loses track of which one it is describing.
    """
    n = min(len(scene.objects), rng.choice([1, 2, 4], p=[0.65, 0.15, 0.2]))
    first = scene._replace(objects=scene.objects[:n])
    return world.terse(first, rng.choice([0.25, 0.5, 0.85]), rng, all_objects=True)


# --- decoder: stage 0 on this world's long captions ----------------------------------------------
def write_manifest(config, avoid, root):
    """root/manifest.jsonl and its PNGs: `caption`, mostly full, conditions the decoder.

    `answer` teaches the captioner to be terse: what reinforcement learning has to bring back.
    """
    from PIL import Image
    rng = np.random.default_rng(config.seed + 4)
    os.makedirs(f'{root}/images', exist_ok=True)
    with open(f'{root}/manifest.jsonl', 'w') as f:
        for i, scene in enumerate(fresh_scenes(rng, config.decoder_images, avoid)):
            name = f'images/{i:05d}.png'
            Image.fromarray(world.draw(scene)).save(f'{root}/{name}', compress_level=1)
            answer = few(brief(scene, rng), config.most_phrases, rng)
            caption = answer
            if rng.random() < config.full_share:
                caption = world.caption(scene)
            f.write(json.dumps(dict(image=name, caption=caption, answer=answer)) + '\n')


def pretrain_decoder(config, avoid):
    """Stage 0 with the language model in the loop; leaves the whole base in 16-bit safetensors."""
    from lib import checkpoint
    import pretrain_decoder as stage0
    root = f'{os.path.normpath(config.out_dir)}_stage0'
    write_manifest(config, avoid, root)
    shared = [f'--data={root}/manifest.jsonl', f'--encoder={config.encoder}',
              f'--decoder={config.decoder}', f'--dtype={config.dtype}', '--answer_key=answer',
              '--eval_every=0']
    stage0.main([*shared, f'--out_dir={root}/draw', f'--steps={config.decoder_steps}',
                 '--lr=1.5e-3', '--lr_decay=3.0', '--caption_every=2', f'--seed={config.seed}'])
    # then the learning rate falls to 0 with a caption loss at every update: the captioner settles
    # without leaving the decoder behind
    stage0.main([*shared, f'--out_dir={root}/settle', f'--init_from={root}/draw',
                 f'--steps={config.settle_steps}', '--lr=1.2e-3', '--warmup=0', '--caption_every=1',
                 f'--seed={config.seed + 1}'])
    ship(checkpoint.newest(f'{root}/settle'), config.out_dir)
    shutil.rmtree(root)


def ship(folder, out_dir):
    """Writes a checkpoint's models in 16 bits where the base lies."""
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2_5_VLForConditionalGeneration
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(f'{folder}/encoder')
    encoder.half().save_pretrained(f'{out_dir}/encoder')
    decoder = SD3Transformer2DModel.from_pretrained(f'{folder}/decoder/transformer')
    decoder.half().save_pretrained(f'{out_dir}/decoder/transformer')
    projector = load_file(f'{folder}/projector.safetensors')
    projector = {name: tensor.half() for name, tensor in projector.items()}
    save_file(projector, f'{out_dir}/projector.safetensors')


# --- a base whose images are words, for reca.py --------------------------------------------------
BASE = 'data/shapes/base'
SHARP = 10                      # of the distances to words, as logits


def in_words(uae, scenes):
    """Scenes as the tower should see them: token ids (n, 16), the four words of each cell.

    An empty cell's are `, gray background ,`.
    """
    texts = []
    for scene in scenes:
        empty = (',', scene.background, 'background', ',')
        things = {thing.cell: thing for thing in scene.objects}
        words = [word for cell in world.CELLS for word in things.get(cell, empty)]
        texts.append(' '.join(words))
    ids, _, _ = uae.encoder.tokens(texts, 16)
    return ids


def pretrain_terse(config, avoid):
    """A new decoder and projector, which see brief captions alone; the encoder is frozen."""
    import pretrain_decoder as stage0
    from lib import checkpoint
    shutil.copytree(BASE, config.out_dir, dirs_exist_ok=True)
    root = f'{os.path.normpath(config.out_dir)}_stage0'
    torch.manual_seed(config.seed + 6)
    new_decoder(config)
    config.full_share = 0.0
    write_manifest(config, avoid, root)
    stage0.main([f'--data={root}/manifest.jsonl', f'--encoder={config.encoder}',
                 f'--decoder={config.decoder}', '--train_encoder=False', '--eval_every=0',
                 f'--out_dir={root}/draw', f'--steps={config.terse_steps}', '--batch=32',
                 '--lr=1.5e-3', f'--seed={config.seed}'])
    ship(checkpoint.newest(f'{root}/draw'), config.out_dir)


def pretrain_tower(config, avoid):
    """The shipped tower is pulled to words, in squared distance over a word's mean square."""
    from lib.checkpoint import open_uae
    torch.manual_seed(config.seed + 7)
    rng = np.random.default_rng(config.seed + 7)
    uae = open_uae(config)
    words = uae.encoder.embed.weight[:len(uae.encoder.tokenizer)].detach()
    tower = uae.encoder.vlm.model.visual
    # its states are forty times as long as words: it starts at their length
    far = watch(uae, fresh_scenes(rng, 32, avoid))['features'].square().mean()
    for p in tower.merger.mlp[2].parameters():
        p.data *= (words.square().mean() / far).sqrt()
    for p in tower.parameters():
        p.requires_grad_(True)

    def loss_fn():
        scenes = fresh_scenes(rng, 32, avoid)
        told = in_words(uae, scenes)
        seen = watch(uae, scenes)['features']
        apart = (seen[:, :, None] - words).square().mean(-1) / words.square().mean()
        nearest = (apart.argmin(-1) == told).float().mean().item()
        pull = apart.gather(-1, told[..., None]).mean()
        # the right word also has to be the nearest: colours lie close together
        nll = F.cross_entropy(-SHARP * apart.flatten(0, 1), told.flatten())
        return pull + nll, dict(pull=pull.item(), nearest=nearest)

    train('tower', list(tower.parameters()), config.tower_steps, 2e-3, loss_fn)
    uae.encoder.vlm.save_pretrained(f'{config.out_dir}/encoder')


def pretrain_reader(config, avoid):
    """The language model learns to caption what its new tower sees; its states of texts are held.

    So the decoder, which has learnt to read these, remains as it is.
    """
    from lib.checkpoint import open_uae
    torch.manual_seed(config.seed + 5)
    rng = np.random.default_rng(config.seed + 5)
    uae = open_uae(config)
    params = uae.train_only('encoder')
    start = uae.reference('encoder').encoder

    def loss_fn():
        scenes = fresh_scenes(rng, 32, avoid)
        y, mask, _ = uae.encoder.tokens([brief(scene, rng) for scene in scenes])
        logp = uae.encoder.logp(uae.encoder.see(pixels(scenes)), y)
        nll = -(logp * mask).sum() / mask.sum()
        y, mask, _ = uae.encoder.tokens([world.caption(scene) for scene in scenes])
        with torch.no_grad():
            held = start.text_states(y, mask)
        moved = F.mse_loss(uae.encoder.text_states(y, mask), held)
        return nll + moved, dict(nll=nll.item(), moved=moved.item())

    train('reader', params, config.reader_steps, 1.5e-3, loss_fn)
    uae.encoder.vlm.save_pretrained(f'{config.out_dir}/encoder')


PARTS = dict(vae=pretrain_vae, clip=pretrain_clip, judge=pretrain_judge, encoder=pretrain_encoder,
             decoder=pretrain_decoder, terse=pretrain_terse, tower=pretrain_tower,
             reader=pretrain_reader)


def main(argv):
    config = parse(keys, {}, argv, __file__, limits)
    if config.out_dir == 'out/pretrain':
        config.out_dir = 'data/shapes/base'
    config.encoder = f'{config.out_dir}/encoder'
    config.decoder = f'{config.out_dir}/decoder'
    config.clip = f'local-dir:{config.out_dir}/clip'
    parts = config.parts.split(',')
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise SystemExit(f'--parts={config.parts}: no part {unknown[0]!r}, the parts are '
                         f'{" ".join(PARTS)}')
    avoid = set(world.splits()[1])
    torch.manual_seed(config.seed)
    for part in parts:
        start = time.time()
        PARTS[part](config, avoid)
        print(f'{part}: {time.time() - start:.0f} s')


if __name__ == '__main__':
    main(sys.argv[1:])
