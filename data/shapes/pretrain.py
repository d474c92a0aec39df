"""The tiny base models of the embedded world, trained from nothing on two slow CPU cores (`make base`).

    python data/shapes/pretrain.py                     # all parts into data/shapes/base; LOG.md has the seconds of each
    python data/shapes/pretrain.py --parts=vae,clip --out_dir=out/base --seed=2

Parts, in order; each reads what the earlier ones wrote:
    vae       AutoencoderKL, 3x32x32 -> 4x8x8
    clip      open_clip CLIP, contrastive on (image, caption) with near-miss negatives: the reward
    judge     ConvNeXt, contrastive on images alone, never seen by any training of the loop: the second opinion
    encoder   Qwen2.5-VL that captions scenes, with its tokenizer and processor
    decoder   SD3 transformer and projector, by pretrain_decoder.py (stage 0), while the captioner learns to be brief
Scenes are drawn on the fly and never from the held-out set.
"""
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import config
from data.shapes import scenes as world

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    parts = 'vae,clip,judge,encoder,decoder',    # which to train, comma-separated
    vae_steps = 900,                             # batches of 32
    clip_steps = 500,                            # batches of 96, half of them near misses of the other half
    judge_steps = 400,                           # the same
    encoder_steps = 800,                         # batches of 64 full captions
    decoder_steps = 750,                         # batches of 64, stage 0; more make a better decoder and leave stage 3 less to do
    settle_steps = 250,                          # then as many while the learning rate falls to 0
    decoder_images = 32768,                      # distinct scenes it draws them from
    full_share = 0.75,                           # of the decoder's conditions are full captions, the others terse
    most_phrases = 0,                            # most phrases of a caption the captioner is ever taught; 0 = all
)
# -------------------------------------------------------------------------------------------------------------------


def fresh_scenes(rng, n, avoid):
    """n random scenes, none of them in the set `avoid` (the held-out ones)."""
    found = []
    while len(found) < n:
        scene = world.random_scene(rng)
        if scene not in avoid:
            found.append(scene)
    return found


def mutant(scene, rng):
    """The scene with one attribute changed, one object moved, or another background: a near miss for contrastive training."""
    objects = list(scene.objects)
    kind = rng.choice(['size', 'colour', 'shape', 'cell', 'background'])
    if kind == 'background':
        return scene._replace(background=rng.choice([b for b in world.BACKGROUNDS if b != scene.background]))
    i = rng.integers(len(objects))
    values = dict(size=world.SIZES, colour=world.COLOURS, shape=world.SHAPES, cell=world.CELLS)[kind]
    taken = {o.cell for o in objects} if kind == 'cell' else {getattr(objects[i], kind)}
    free = [v for v in values if v not in taken]
    if not free:
        return mutant(scene, rng)
    objects[i] = objects[i]._replace(**{kind: str(rng.choice(free))})
    objects.sort(key=lambda o: list(world.CELLS).index(o.cell))
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


# --- vae -----------------------------------------------------------------------------------------------------------
def pretrain_vae(c, avoid):
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    rng = np.random.default_rng(c.seed)
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 24, 48), layers_per_block=1,
                        down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3, norm_num_groups=8,
                        sample_size=32, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
                        scaling_factor=1.0, shift_factor=0.0)

    def loss_fn():
        x = pixels(fresh_scenes(rng, 32, avoid))
        posterior = vae.encode(x).latent_dist
        d = vae.decode(posterior.sample()).sample - x
        mse = d.square().mean()
        return mse + 0.3 * d.abs().mean() + 1e-5 * posterior.kl().mean(), dict(mse=mse.item())

    train('vae', list(vae.parameters()), c.vae_steps, 3e-3, loss_fn)
    vae.eval()
    with torch.no_grad():                        # the latents' own scale, so that the decoder sees unit variance
        z = vae.encode(pixels(fresh_scenes(rng, 512, avoid))).latent_dist.mean
    vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))
    vae.half().save_pretrained(f'{c.out_dir}/decoder/vae')
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(f'{c.out_dir}/decoder/scheduler')


# --- clip: image and caption ---------------------------------------------------------------------------------------
def pretrain_clip(c, avoid):
    import open_clip
    rng = np.random.default_rng(c.seed + 1)
    torch.manual_seed(c.seed + 1)
    model_cfg = dict(embed_dim=64, vision_cfg=dict(image_size=32, layers=3, width=96, head_width=32, patch_size=4),
                     text_cfg=dict(context_length=32, vocab_size=64, width=96, heads=3, layers=2))
    clip = open_clip.CLIP(**model_cfg)
    index = {w: i + 1 for i, w in enumerate(world.WORDS)}
    end = len(index) + 1                         # open_clip reads the text feature at the largest token id

    def loss_fn():
        batch = contrastive_batch(rng, 96, avoid)
        text = torch.zeros(96, 32, dtype=torch.long)
        for i, s in enumerate(batch):
            ids = [index[w] for w in world.caption(s).split()] + [end]
            text[i, :len(ids)] = torch.tensor(ids)
        x = pixels(batch) + 0.05 * torch.randn(96, 3, 32, 32)
        f, g, scale = clip(x, text)
        logits = scale * f @ g.T
        target = torch.arange(96)
        hits = (logits.argmax(1) == target).float().mean().item()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, dict(hits=hits)

    train('clip', list(clip.parameters()), c.clip_steps, 1.5e-3, loss_fn)
    os.makedirs(f'{c.out_dir}/clip', exist_ok=True)
    half = dict(mean=[0.5] * 3, std=[0.5] * 3)
    with open(f'{c.out_dir}/clip/open_clip_config.json', 'w') as f:
        json.dump(dict(model_cfg=model_cfg, preprocess_cfg=half), f, indent=1)
    save_half(clip, f'{c.out_dir}/clip/open_clip_model.safetensors')


def save_half(module, path):
    from safetensors.torch import save_file
    save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in module.state_dict().items()}, path)


# --- judge: images alone -------------------------------------------------------------------------------------------
def pretrain_judge(c, avoid):
    from transformers import ConvNextConfig, ConvNextModel
    rng = np.random.default_rng(c.seed + 2)
    torch.manual_seed(c.seed + 2)
    judge = ConvNextModel(ConvNextConfig(image_size=32, patch_size=4, num_stages=2, hidden_sizes=[64, 128], depths=[2, 2]))

    def view(x):                                 # what must not matter: noise and a little light
        gain = 1 + 0.1 * torch.randn(len(x), 1, 1, 1)
        return x * gain + 0.1 * torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) + 0.05 * torch.randn(len(x), 1, 1, 1)

    def loss_fn():
        x = pixels(contrastive_batch(rng, 96, avoid))
        f = F.normalize(judge(torch.cat([view(x), view(x)])).pooler_output, dim=-1)
        logits = f[:96] @ f[96:].T / 0.07
        target = torch.arange(96)
        hits = (logits.argmax(1) == target).float().mean().item()
        return F.cross_entropy(logits, target), dict(hits=hits, other=(logits.mean() * 0.07).item())

    train('judge', list(judge.parameters()), c.judge_steps, 1e-3, loss_fn)
    judge.half().save_pretrained(f'{c.out_dir}/judge')
    with open(f'{c.out_dir}/judge/preprocessor_config.json', 'w') as f:
        json.dump(dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, size=dict(height=32, width=32)), f, indent=1)


# --- encoder: tokenizer, processor, captioner ------------------------------------------------------------------------
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>', '<unk>']
TEMPLATE_WORDS = ['user', 'assistant', 'generate', 'system', 'describe', 'the', 'image', 'random']
# Qwen's chat template without its default system turn, words separated by blanks
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
    "<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}")


def save_processor(folder):
    """Word-level tokenizer, one token a word, and Qwen's image processor with 4-pixel patches."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    vocab = {w: i for i, w in enumerate([*SPECIAL, *world.WORDS, *[w for w in TEMPLATE_WORDS if w not in world.WORDS]])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token='<unk>', pad_token='<|endoftext|>', eos_token='<|im_end|>',
                                        additional_special_tokens=SPECIAL[1:2] + SPECIAL[3:7], clean_up_tokenization_spaces=False)
    patches = dict(patch_size=4, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=256, longest_edge=64 * 64),
                   image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**patches), tokenizer, Qwen2VLVideoProcessor(**patches), CHAT_TEMPLATE).save_pretrained(folder)
    return vocab


def new_models(c):
    """Random encoder, decoder and projector, written beside the trained VAE so that every script can load the lot."""
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from model import Projector
    vocab = save_processor(f'{c.out_dir}/encoder')
    ids = dict(image_token_id=vocab['<|image_pad|>'], video_token_id=vocab['<|video_pad|>'], vision_start_token_id=vocab['<|vision_start|>'],
               vision_end_token_id=vocab['<|vision_end|>'])
    text = dict(vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=128, bos_token_id=vocab['<|endoftext|>'], eos_token_id=vocab['<|im_end|>'], pad_token_id=vocab['<|endoftext|>'],
                rope_parameters=dict(rope_type='default', rope_theta=10000.0, mrope_section=[4, 6, 6]))
    vision = dict(depth=2, hidden_size=96, intermediate_size=256, num_heads=3, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
                  window_size=32, out_hidden_size=128, fullatt_block_indexes=[0, 1])
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
    decoder = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=32, num_attention_heads=4,
                                    joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=32, pos_embed_max_size=8, qk_norm='rms_norm')
    encoder.save_pretrained(f'{c.out_dir}/encoder')
    decoder.save_pretrained(f'{c.out_dir}/decoder/transformer')
    save_file(Projector(128, 128).state_dict(), f'{c.out_dir}/projector.safetensors')


def few(text, most, rng):
    """The caption with at most `most` of its phrases, drawn at random and left in order; 0 = all of them."""
    phrases = text.removesuffix(' .').split(' , ')
    if not most or len(phrases) <= most:
        return text
    return ' , '.join(phrases[i] for i in sorted(rng.choice(len(phrases), most, replace=False))) + ' .'


def pretrain_encoder(c, avoid):
    """Full captions first (without most_phrases): everything the captioner can know about a scene."""
    from model import UAE
    torch.manual_seed(c.seed + 3)
    rng = np.random.default_rng(c.seed + 3)
    new_models(c)
    uae = UAE(c)
    params = list(uae.encoder.parameters())
    for p in params:
        p.requires_grad_(True)

    def loss_fn():
        scenes = fresh_scenes(rng, 64, avoid)
        y, mask, _ = uae.tokens([few(world.caption(s), c.most_phrases, rng) for s in scenes])
        loss = -(uae.caption_logp(uae.see(pixels(scenes)), y) * mask).sum() / mask.sum()
        return loss, {}

    train('encoder', params, c.encoder_steps, 3e-3, loss_fn)
    uae.encoder.save_pretrained(f'{c.out_dir}/encoder')


def brief(scene, rng):
    """How the captioner is taught to speak: of the first object or two, seldom of all, and leaving attributes out.

    Sampled captions then hold a quarter of the facts, and the likeliest caption is not the full one: reinforcement
    learning has something to bring back, by sampling and by search alike. Objects are told in reading order from the
    first: told at random, a three-layer language model loses track of which one it is describing.
    """
    n = min(len(scene.objects), rng.choice([1, 2, 4], p=[0.65, 0.15, 0.2]))
    return world.terse(scene._replace(objects=scene.objects[:n]), rng.choice([0.25, 0.5, 0.85]), rng, all_objects=True)


# --- decoder: stage 0 on this world's long captions ------------------------------------------------------------------
def write_manifest(c, avoid, root):
    """root/manifest.jsonl and its PNGs: `caption` conditions the decoder (mostly full), `answer` teaches the captioner to
    be terse: what reinforcement learning then has to bring back."""
    from PIL import Image
    rng = np.random.default_rng(c.seed + 4)
    os.makedirs(f'{root}/images', exist_ok=True)
    with open(f'{root}/manifest.jsonl', 'w') as f:
        for i, scene in enumerate(fresh_scenes(rng, c.decoder_images, avoid)):
            Image.fromarray(world.draw(scene)).save(f'{root}/images/{i:05d}.png', compress_level=1)
            answer = few(brief(scene, rng), c.most_phrases, rng)
            caption = world.caption(scene) if rng.random() < c.full_share else answer
            f.write(json.dumps(dict(image=f'images/{i:05d}.png', caption=caption, answer=answer)) + '\n')


def pretrain_decoder(c, avoid):
    """Stage 0 with the language model in the loop; leaves the whole base in 16-bit safetensors."""
    import shutil
    from transformers import Qwen2_5_VLForConditionalGeneration
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import load_file, save_file
    import common
    import pretrain_decoder as stage0
    root = f'{os.path.normpath(c.out_dir)}_stage0'
    write_manifest(c, avoid, root)
    words = [f'--data={root}/manifest.jsonl', f'--encoder={c.encoder}', f'--decoder={c.decoder}', f'--seed={c.seed}', f'--dtype={c.dtype}',
             '--answer_key=answer', '--eval_every=0']
    stage0.main([*words, f'--out_dir={root}/draw', f'--steps={c.decoder_steps}', '--lr=1.5e-3', '--lr_decay=3.0',
                 '--caption_every=2'])
    # then the learning rate falls to 0 with a caption loss at every update: the captioner settles without leaving the decoder behind
    stage0.main([*words, f'--out_dir={root}/settle', f'--init_from={root}/draw', f'--steps={c.settle_steps}', '--lr=1.2e-3', '--warmup=0',
                 '--caption_every=1', f'--seed={c.seed + 1}'])
    ckpt = common.newest(f'{root}/settle')
    Qwen2_5_VLForConditionalGeneration.from_pretrained(f'{ckpt}/encoder').half().save_pretrained(f'{c.out_dir}/encoder')
    SD3Transformer2DModel.from_pretrained(f'{ckpt}/decoder/transformer').half().save_pretrained(f'{c.out_dir}/decoder/transformer')
    save_file({k: v.half() for k, v in load_file(f'{ckpt}/projector.safetensors').items()}, f'{c.out_dir}/projector.safetensors')
    shutil.rmtree(root)


if __name__ == '__main__':
    c = config.parse(keys, {}, sys.argv[1:], __file__)
    if c.out_dir == 'out/pretrain':
        c.out_dir = 'data/shapes/base'
    c.encoder, c.decoder, c.clip = f'{c.out_dir}/encoder', f'{c.out_dir}/decoder', f'local-dir:{c.out_dir}/clip'
    avoid = set(world.splits()[1])
    torch.manual_seed(c.seed)
    for part in c.parts.split(','):
        t = time.time()
        globals()[f'pretrain_{part}'](c, avoid)
        print(f'{part}: {time.time() - t:.0f} s')
