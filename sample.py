"""One image (or a folder) -> caption -> reconstruction; one prompt -> image; a checkpoint -> folders that other tools load.

    python sample.py --init_from=out/grpo_decoder --image=scene.png
    python sample.py --init_from=out/grpo_decoder --image=/data/photos      # captions.jsonl for a whole folder, resumable
    torchrun --nproc_per_node=8 sample.py --preset=paper --init_from=out/grpo_encoder --image=/data/photos --draw=False
    python sample.py --init_from=out/grpo_decoder --prompt="small red circle top-left , gray background ."
    python sample.py --init_from=out/grpo_decoder --export=out/plain

--image and --prompt write out_dir/NAME.png (source | reconstruction) and out_dir/captions.jsonl, one {"image", "caption"} a
line: the manifest that pretrain_decoder.py reads. A caption depends on --seed and the image's name, not on the images
beside it, the batch or the ranks.

--export=DIR writes a plain Qwen2.5-VL folder, adapters merged, that lmms-eval and VLMEvalKit take as their model path: our
weights under the names that the hub uses, every other file the base model's own, since transformers 5 would write a
configuration that older libraries misread. DIR/decoder holds transformer/ (diffusers, merged) and projector.safetensors.
"""
import collections
import glob
import json
import os
import shutil
import sys
import zlib

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import common
import config
import eval_unified
from data.images import ImageError, keep, open_images
from model import UAE

# --- script keys ---------------------------------------------------------------------------------------------------
keys = dict(
    steps = 0,                 # updates: none here; the word exists in every script
    image = '',                # an image file, a folder, or a manifest
    prompt = '',               # a text to draw
    export = '',               # a new folder for the checkpoint in plain form
    batch = 8,                 # images at a time on a rank
    draw = True,               # also draw each caption; False = captions only
)
# -------------------------------------------------------------------------------------------------------------------


def from_prompt(uae, c):
    """Draws c.prompt into out_dir/prompt.png."""
    y, mask, cut = uae.tokens([c.prompt])
    if cut:
        print(f'warning: the prompt has more than caption_len - 1 = {c.caption_len - 1} tokens and was cut')
    noise = [c.seed]
    x_hat = eval_unified.draw(uae, y, mask, noise)
    keep(x_hat[0].clamp(-1, 1), f'{c.out_dir}/prompt.png')
    print(f'{c.out_dir}/prompt.png')


def captioned(path, run):
    """The images that a captions.jsonl has already. A last line that a kill cut short is dropped from the file."""
    if not os.path.exists(path):
        return set()
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.readlines()
    whole = [line for line in lines if line.endswith('\n')]
    if run.master and whole != lines:
        common.write_atomic(path, lambda tmp: common.write_lines(tmp, whole))
    try:
        return {json.loads(line)['image'] for line in whole}
    except (ValueError, TypeError, KeyError) as e:
        raise SystemExit(f'{path}: not one {{"image", "caption"}} a line ({e}); mend it, or give another --out_dir')


def from_images(uae, c, run):
    """Captions every image of c.image, and draws the captions; images already in captions.jsonl are left alone."""
    images = open_images(c.image, c.resolution, *c.data_keys)
    if any(len(image) > 1 for image, _ in images.sources):
        raise SystemExit(f'--image={c.image}: captions.jsonl cannot name an image inside a tar; unpack it first')
    if os.path.isdir(c.image) and os.path.realpath(c.out_dir).startswith(os.path.realpath(c.image) + os.sep):
        raise SystemExit(f'--out_dir={c.out_dir} lies in --image={c.image}: its pictures would be captioned next time')
    os.makedirs(c.out_dir, exist_ok=True)
    path = f'{c.out_dir}/captions.jsonl'
    files = [os.path.abspath(image[0]) for image, _ in images.sources]
    done = captioned(path, run)
    todo = [i for i, file in enumerate(files) if file not in done]
    stems = collections.Counter(os.path.splitext(name)[0] for name in images.names)
    for start in tqdm(range(0, len(todo), c.batch * run.world), desc='sample', disable=len(todo) < 2 or not run.master):
        mine = todo[start:start + c.batch * run.world][run.rank::run.world]
        found = [(i, x) for i in mine for x in readable(images, i)]
        texts = []
        if found:
            x = torch.stack([x for _, x in found]).to(uae.device)
            rows = [c.seed << 32 | zlib.crc32(images.names[i].encode()) for i, _ in found]
            texts, _, x_hat = eval_unified.reconstruct(uae, x, rows, c.eval_temperature, c.draw)
            for k, (i, _) in enumerate(found if c.draw else ()):            # before its line: a line says that all is done
                stem = os.path.splitext(images.names[i])[0]
                keep(torch.cat([x[k], x_hat[k]], 2).clamp(-1, 1), os.path.join(c.out_dir, (stem if stems[stem] == 1 else images.names[i]) + '.png'))
        lines = common.gather_objects([(i, json.dumps(dict(image=files[i], caption=text)) + '\n') for (i, _), text in zip(found, texts)], run)
        if run.master:
            with open(path, 'a') as f:
                f.writelines(line for _, line in sorted(lines))
    if len(files) == 1 and todo and texts:
        print(texts[0])
    skipped = common.total(len(images.skipped), run)
    if run.master:
        print(f'{path}: {len(todo) - skipped:.0f} captions more, {len(done)} were there' + (f', {skipped:.0f} images skipped' if skipped else ''))


def readable(images, i):
    """[image i (3, R, R)], or [] with a warning if it cannot be read."""
    try:
        return [images.get(i)[0]]
    except ImageError as e:
        images.skipped[images.names[i]] = str(e)
        print(f'warning: skipped {images.names[i]}: {e}', flush=True)
        return []


def merge_lora(tower):
    """Adds LoRA adapters into the layers they sit on and takes them out: the plain module again."""
    for name, layer in list(tower.named_modules()):
        if hasattr(layer, 'get_base_layer'):
            layer.merge(safe_merge=True)
            tower.set_submodule(name, layer.get_base_layer())


def plain_files(source):
    """Configuration, processor and tokenizer files of a local folder or hub id."""
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        source = snapshot_download(source, allow_patterns=['*.json', '*.txt', '*.jinja'], ignore_patterns=['*.index.json'])
    found = [path for end in ('json', 'txt', 'jinja') for path in glob.glob(f'{source}/*.{end}')]
    return {os.path.basename(path): path for path in found if not path.endswith('.index.json')}


def export(uae, c):
    """Writes c.export as the docstring above says; beside and renamed, so a kill leaves no half of it."""
    from huggingface_hub import save_torch_state_dict
    tmp = c.export.rstrip('/') + '.tmp'
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(f'{tmp}/decoder')
    for tower in (uae.encoder, uae.decoder):
        merge_lora(tower)
        tower.to(getattr(torch, c.dtype))
    # a loaded model's save_pretrained repeats the names of the file it came from; harnesses need the hub's
    weights = {k.replace('model.language_model.', 'model.').replace('model.visual.', 'visual.'): v for k, v in uae.encoder.state_dict().items()}
    if uae.head.weight is uae.embed.weight:
        del weights['lm_head.weight']
    save_torch_state_dict(weights, tmp, max_shard_size='4GB')
    own = plain_files(c.encoder)
    own.update({k: v for k, v in plain_files(uae.source).items() if k not in ('config.json', 'generation_config.json')})
    for name, path in own.items():
        shutil.copyfile(path, f'{tmp}/{name}')
    with open(f'{tmp}/config.json') as f:
        base = json.load(f)
    base.update({k: c.dtype for k in ('dtype', 'torch_dtype') if k in base}, architectures=['Qwen2_5_VLForConditionalGeneration'])
    with open(f'{tmp}/config.json', 'w') as f:
        json.dump(base, f, indent=2)
    uae.decoder.save_pretrained(f'{tmp}/decoder/transformer', max_shard_size='4GB')
    save_file(uae.projector.state_dict(), f'{tmp}/decoder/projector.safetensors')    # in the folder above, vLLM would take it for Qwen's
    os.replace(tmp, c.export.rstrip('/'))
    print(c.export)


def main(argv):
    c = config.parse(keys, {}, argv, __file__)
    if (c.image, c.prompt, c.export).count('') != 2:
        raise SystemExit('give one of --image=FILE_OR_FOLDER, --prompt=TEXT and --export=NEW_FOLDER')
    if c.batch < 1:
        raise SystemExit(f'--batch={c.batch}: at least 1')
    if c.export and os.path.exists(c.export) and (not os.path.isdir(c.export) or os.listdir(c.export)):
        raise SystemExit(f'--export={c.export} is there already and not an empty folder')
    run = common.start(c)
    if run.world > 1 and not c.image:
        raise SystemExit('several ranks are for --image; --prompt and --export take one')
    uae = UAE(c, run.device)
    if c.image:
        from_images(uae, c, run)
    else:
        (export if c.export else from_prompt)(uae, c)


if __name__ == '__main__':
    main(sys.argv[1:])
