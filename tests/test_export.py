"""What other tools read, and what others wrote; outputs agree to 1e-5 with the model in memory.

Read by others: the decoder's LoRA in a plain SD3 pipeline, the encoder's in peft, exported folders
in plain library classes. Written by others: the authors' released layout.
"""
import copy
import json
import os
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lib import ranks
from lib.checkpoint import choose_text_encoder, open_uae, save_models
from lib.release import released_key
from tools.export import hub_weights
from comparing import BASE
from conftest import at, shared_config
from running import refusal, script, tiny

VLM = transformers.Qwen2_5_VLForConditionalGeneration
TRANSFORMER = diffusers.SD3Transformer2DModel


def load(*flags):
    """A UAE as a script with these flags would have it."""
    ranks.quiet()
    return open_uae(shared_config(*flags))


def shake(uae, what='', scale=0.05):
    """Noise on every weight of the three models whose name contains `what`: none is trivial."""
    for model in (uae.encoder.vlm, uae.decoder.transformer, uae.projector):
        for i, (name, p) in enumerate(model.named_parameters()):
            if what in name:
                g = torch.Generator().manual_seed(i)
                with torch.no_grad():
                    p.add_(scale * torch.randn(p.shape, generator=g))
    return uae


def save(uae, out_dir, *flags):
    """A checkpoint step_000001 in out_dir, of a run with these flags."""
    save_models(uae, f'{out_dir}/step_000001')
    config = vars(shared_config(*flags))
    with open(f'{out_dir}/step_000001/meta.json', 'w') as f:
        json.dump(dict(step=1, config=config), f)


def velocity(transformer, uae):
    """One forward pass on fixed inputs."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(2, *uae.decoder.latent_shape(), generator=g)
    c = torch.randn(2, 5, uae.decoder.width, generator=g)
    with torch.no_grad():
        return transformer(
            hidden_states=z, timestep=torch.tensor([300.0, 900.0]), encoder_hidden_states=c,
            pooled_projections=uae.decoder.pooled.expand(2, -1), return_dict=False)[0]


def logits(vlm, processor, x):
    """Logits of an image and a question, the inputs made as an evaluation harness makes them."""
    question = dict(type='text', text='describe the image')
    message = dict(role='user', content=[dict(type='image'), question])
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    pixels = ((x + 1) * 127.5).round().byte()
    inputs = processor(text=[text], images=[pixels], return_tensors='pt')
    with torch.no_grad():
        return vlm(**inputs).logits


def close(a, b):
    """Equal to 1e-5; of the largest entry, since the tiny model's logits reach 11."""
    assert a.shape == b.shape
    off, largest = (a - b).abs().max(), b.abs().max()
    assert off < 1e-5 * max(1, largest), (off, largest)


def check_same(uae, other, x):
    """Two UAEs have the same captioner, transformer and projector."""
    processor = uae.encoder.processor
    close(logits(uae.encoder.vlm, processor, x[0]), logits(other.encoder.vlm, processor, x[0]))
    close(velocity(uae.decoder.transformer, uae), velocity(other.decoder.transformer, other))
    h = torch.randn(3, uae.projector.up.in_features, generator=torch.Generator().manual_seed(1))
    close(uae.projector(h), other.projector(h))


# --- the adapters of a checkpoint ----------------------------------------------------------------
@pytest.fixture(scope='module')
def adapters(tmp_path_factory):
    """A checkpoint with LoRA of rank 4, the adapters shaken: (folder, the model in memory)."""
    out = tmp_path_factory.mktemp('lora') / 'run'
    tiny('grpo_decoder', out, '--lora_rank=4', steps=1)
    uae = shake(load('--lora_rank=4', f'--init_from={out}'), 'lora_', 0.03)
    save_models(uae, f'{out}/step_000001')
    return str(out), uae


def test_decoder_lora_in_a_plain_pipeline(adapters):
    """Its alpha of twice the rank travels in the file's metadata, else it would be halved."""
    out, uae = adapters
    classes = dict(transformer=TRANSFORMER, vae=diffusers.AutoencoderKL,
                   scheduler=diffusers.FlowMatchEulerDiscreteScheduler)
    parts = {}
    for name, cls in classes.items():
        parts[name] = cls.from_pretrained(f'{BASE}/decoder', subfolder=name)
    for number in ('', '_2', '_3'):
        parts[f'text_encoder{number}'] = parts[f'tokenizer{number}'] = None
    pipe = diffusers.StableDiffusion3Pipeline(**parts)
    pipe.transformer.float()
    ours = velocity(uae.decoder.transformer, uae)
    assert (velocity(pipe.transformer, uae) - ours).abs().max() > 0.05, 'the adapter does something'
    pipe.load_lora_weights(f'{out}/step_000001/decoder')
    close(velocity(pipe.transformer, uae), ours)
    pipe.fuse_lora()
    close(velocity(pipe.transformer, uae), ours)


# peft's own: PeftModel asks transformers by the old name
@pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing` is deprecated')
def test_encoder_lora_in_plain_peft(adapters, x):
    from peft import PeftModel
    out, uae = adapters
    for model in (uae.encoder.vlm, uae.decoder.transformer):
        lora = model.peft_config['default']
        assert (lora.r, lora.lora_alpha, lora.init_lora_weights) == (4, 8, 'gaussian')
    processor = uae.encoder.processor
    plain = VLM.from_pretrained(f'{BASE}/encoder', dtype=torch.float32)
    ours = logits(uae.encoder.vlm, processor, x[0])
    assert (logits(plain, processor, x[0]) - ours).abs().max() > 0.05
    model = PeftModel.from_pretrained(plain, f'{out}/step_000001/encoder')
    close(logits(model, processor, x[0]), ours)


# --- the authors' release ------------------------------------------------------------------------
def in_shards(tensors, folder):
    """Files of 1 MB and their index, as the hub's are."""
    huggingface_hub.save_torch_state_dict(tensors, folder, max_shard_size='1MB')
    assert os.path.exists(f'{folder}/model.safetensors.index.json')


def wrapped(name, lora):
    """A parameter's name with peft put around `.model`, as the release's script does."""
    if name.startswith('model.'):
        name = name.replace('model.', 'model.base_model.model.', 1)
    if name.removesuffix('.weight').removesuffix('.bias') in lora:
        name = name.replace('.weight', '.base_layer.weight').replace('.bias', '.base_layer.bias')
    return name


def released_projector(uae):
    """The projector's tensors under the names that a Sequential gives them."""
    tensors = {}
    for name, tensor in uae.projector.state_dict().items():
        layer, kind = name.split('.')
        number = dict(up='0', down='2')[layer]
        tensors[f'projector.{number}.{kind}'] = tensor
    return tensors


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    """A made-up release of the tiny model: (folder, the model it holds).

    llm and dit hold one model, llm_lora and dit_lora what stages 2 and 3 made of it.
    """
    folder = str(tmp_path_factory.mktemp('uae'))
    uae = shake(load())
    truth = shake(load(), scale=0.03)
    os.makedirs(f'{folder}/llm')
    os.makedirs(f'{folder}/llm_lora')
    in_shards({**hub_weights(uae.encoder), **released_projector(uae)}, f'{folder}/llm')
    for name in ('config.json', 'generation_config.json'):
        shutil.copy(f'{BASE}/encoder/{name}', f'{folder}/llm')
    uae.decoder.transformer.save_pretrained(f'{folder}/dit')

    g = torch.Generator().manual_seed(7)
    modules = truth.encoder.vlm.model.named_modules(prefix='model')
    linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    stage2 = truth.encoder.vlm.state_dict()
    tensors = {wrapped(k, linear): v.clone() for k, v in stage2.items() if k != 'lm_head.weight'}
    for name in linear:
        out, into = stage2[f'{name}.weight'].shape
        A, B = torch.randn(4, into, generator=g) / 8, torch.randn(out, 4, generator=g) / 16
        layer = wrapped(name, ())
        tensors[f'{layer}.lora_A.default.weight'] = A
        tensors[f'{layer}.lora_B.default.weight'] = B
        stage2[f'{name}.weight'].add_(2 * B @ A)
    in_shards({**tensors, **released_projector(truth)}, f'{folder}/llm_lora')

    truth.decoder.transformer.load_state_dict(uae.decoder.transformer.state_dict())
    from peft import LoraConfig, get_peft_model
    adapter = LoraConfig(r=4, lora_alpha=12, target_modules=['to_q', 'to_k', 'add_v_proj'])
    peft = get_peft_model(truth.decoder.transformer, adapter)
    for p in peft.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g) / 8
    peft.save_pretrained(f'{folder}/dit_lora')
    truth.decoder.transformer = peft.merge_and_unload()
    return folder, truth


def test_release_is_read(release, x):
    """llm_lora wins over llm, its LoRA pairs are added at 64 / 32, dit_lora at its own scale."""
    folder, truth = release
    check_same(load(f'--init_from=uae:{folder}'), truth, x)


def test_release_without_its_adapters(release, tmp_path, x):
    """In a folder whose name is no pattern."""
    place = tmp_path / 'uae[1]*'
    place.mkdir()
    for part in ('llm', 'dit'):
        os.symlink(f'{release[0]}/{part}', place / part)
    check_same(load(f'--init_from=uae:{place}'), shake(load()), x)


def test_adapters_trained_on_a_release_stand_on_it(release, tmp_path, x):
    """Their checkpoint holds adapters alone: later runs have to find the release below them."""
    folder, truth = release
    shutil.copytree(folder, tmp_path / 'r')
    still = ['--lr=0.0', '--lora_rank=2']
    tiny('grpo_decoder', tmp_path / 'a', f'--init_from=uae:{tmp_path}/r', *still, steps=1)
    tiny('grpo_decoder', tmp_path / 'b', f'--init_from={tmp_path}/a', *still, steps=1)
    tiny('grpo_decoder', tmp_path / 'full', f'--init_from=uae:{tmp_path}/r', '--lr=0.0', steps=1)
    check_same(load(f'--init_from={tmp_path}/b', '--lora_rank=2'), truth, x)
    shutil.rmtree(tmp_path / 'r')
    assert f'{tmp_path}/r' in refusal(load, f'--init_from={tmp_path}/b', '--lora_rank=2')
    check_same(load(f'--init_from={tmp_path}/full'), truth, x)


TEXT, VISION = 'model.language_model', 'model.visual'
BLOCK = 'transformer_blocks.1.attn'


@pytest.mark.parametrize('key, name, factor', [
    ('model.layers.0.mlp.up_proj.weight', f'{TEXT}.layers.0.mlp.up_proj.weight', ''),
    ('model.language_model.norm.weight', f'{TEXT}.norm.weight', ''),
    ('language_model.model.embed_tokens.weight', f'{TEXT}.embed_tokens.weight', ''),
    ('visual.blocks.0.norm1.weight', f'{VISION}.blocks.0.norm1.weight', ''),
    ('module.model.visual.merger.mlp.0.bias', f'{VISION}.merger.mlp.0.bias', ''),
    ('model.base_model.visual.merger.mlp.2.base_layer.bias', f'{VISION}.merger.mlp.2.bias', ''),
    ('model.base_model.model.layers.3.mlp.up_proj.lora_B.default.weight',
     f'{TEXT}.layers.3.mlp.up_proj.weight', 'B'),
    ('model.base_model.model.visual.blocks.0.attn.qkv.lora_A.default.weight',
     f'{VISION}.blocks.0.attn.qkv.weight', 'A'),
    ('module.lm_head.weight', 'lm_head.weight', ''),
    ('projector.0.weight', 'projector.up.weight', ''),
    ('projector.2.bias', 'projector.down.bias', ''),
    (f'base_model.model.{BLOCK}.to_out.0.lora_A.weight', f'{BLOCK}.to_out.0.weight', 'A'),
    (f'transformer.{BLOCK}.to_q.lora_B.weight', f'{BLOCK}.to_q.weight', 'B')])
def test_key_map(key, name, factor):
    assert released_key(key) == (name, factor)


def drop(tensors, key):
    del tensors[key]


def add_odd(tensors, key):
    tensors['odd'] = torch.zeros(1)


def shorten(tensors, key):
    tensors[key] = tensors[key][:2]


def narrow(tensors, key):
    tensors[key] = tensors[key][:, :3].contiguous()


@pytest.mark.parametrize('part, word, change, says', [
    ('llm', 'norm', drop, '1 missing keys'),
    ('dit', 'norm', drop, '1 missing keys'),
    ('llm', 'norm', add_odd, "1 unknown keys, first 'odd'"),
    ('dit', 'norm', add_odd, "first 'odd'"),
    ('llm_lora', 'norm', add_odd, 'odd: unknown key'),
    ('dit_lora', 'lora_A', add_odd, 'odd: unknown key'),
    ('llm_lora', 'lora_B', drop, 'half a LoRA pair'),
    ('llm_lora', 'norm', shorten, 'shape (2,'),
    ('dit_lora', 'lora_A', narrow, 'LoRA pair at'),
    ('llm', 'projector', drop, 'expected projector.0 and projector.2')])
def test_release_that_does_not_fit(release, tmp_path, part, word, change, says):
    """Changed at the first key with that word in it."""
    shutil.copytree(release[0], tmp_path / 'r')
    folder = tmp_path / 'r' / part
    for path in sorted(folder.glob('*.safetensors')):
        tensors = load_file(path)
        found = [key for key in tensors if word in key]
        if found:
            change(tensors, found[0])
            save_file(tensors, path, metadata=dict(format='pt'))
            break
    message = refusal(load, f'--init_from=uae:{tmp_path}/r')
    assert str(folder) in message and says in message


def test_release_with_parts_gone(release, tmp_path):
    assert 'no folder llm' in refusal(load, f'--init_from=uae:{tmp_path}')
    shutil.copytree(release[0], tmp_path / 'r')
    lost = sorted((tmp_path / 'r' / 'llm_lora').glob('*.safetensors'))[1]
    lost.unlink()
    assert f'{lost} is missing' in refusal(load, f'--init_from=uae:{tmp_path}/r')
    with open(tmp_path / 'r' / 'dit_lora' / 'adapter_config.json', 'w') as f:
        json.dump(dict(r=4, lora_alpha=8, use_dora=True), f)
    os.rename(tmp_path / 'r' / 'llm_lora', tmp_path / 'away')
    assert 'use_dora' in refusal(load, f'--init_from=uae:{tmp_path}/r')


# --- sample.py --export --------------------------------------------------------------------------
def export_and_compare(folder, uae, x, *flags):
    """Exports with these flags; the plain classes, without a word on precision, agree with uae."""
    script('sample', f'--export={folder}', f'--out_dir={folder}_out', '--device=cpu', *flags)
    plain, info = VLM.from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    processor = transformers.AutoProcessor.from_pretrained(folder)
    ours = logits(uae.encoder.vlm, uae.encoder.processor, x[0])
    close(logits(plain, processor, x[0]), ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer('red circle').input_ids == uae.encoder.tokenizer('red circle').input_ids
    transformer = TRANSFORMER.from_pretrained(f'{folder}/decoder', subfolder='transformer')
    close(velocity(transformer, uae), velocity(uae.decoder.transformer, uae))
    saved = load_file(f'{folder}/decoder/projector.safetensors')
    projector = uae.projector.state_dict()
    assert saved.keys() == projector.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in projector.items())
    files = [name for name in os.listdir(folder) if name.endswith('.safetensors')]
    assert not os.path.exists(f'{folder}.tmp')
    return set().union(*(load_file(f'{folder}/{name}') for name in files))


def test_export_of_adapters(adapters, tmp_path, x):
    out, uae = adapters
    flags = ['--lora_rank=4', f'--init_from={out}']
    names = export_and_compare(f'{tmp_path}/new/plain', uae, x, *flags)
    hubs = load_file(f'{BASE}/encoder/model.safetensors').keys()
    assert names == hubs, "the hub's, no lora, no projector for vLLM to trip over, no tied copy"


def plain_condition(folder, uae, y, mask):
    """Conditions of captions y by the library's classes, from what an export wrote."""
    config = transformers.Qwen2_5_VLConfig.from_pretrained(folder)
    language_model = transformers.Qwen2_5_VLTextModel(config.text_config).eval()
    weights = load_file(f'{folder}/decoder/text_encoder/model.safetensors')
    language_model.load_state_dict(weights)
    saved = load_file(f'{folder}/decoder/projector.safetensors')
    ids, attend = uae.encoder.text_ids(y, mask)
    with torch.no_grad():
        out = language_model(input_ids=ids, attention_mask=attend, use_cache=False)
        inner = torch.nn.functional.linear(
            out.last_hidden_state, saved['up.weight'], saved['up.bias'])
        inner = torch.nn.functional.gelu(inner)
        return torch.nn.functional.linear(inner, saved['down.weight'], saved['down.bias'])


@pytest.mark.parametrize('rank', [0, 4])
def test_export_of_a_text_encoder(tmp_path, x, rank):
    """It stands beside the captioner, which has moved away from it; both agree with our own."""
    flags = [f'--lora_rank={rank}']
    uae = shake(load(*flags), 'lora_' if rank else '', 0.03)
    params = uae.train_only('encoder')
    choose_text_encoder(uae, 'start')
    y, mask, _ = uae.encoder.tokens(['large red circle top-left .', 'blue .'])
    with torch.no_grad():
        at_first = uae.condition(y, mask)
        for i, p in enumerate(params):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.add_(0.05 * noise)
        assert torch.equal(uae.condition(y, mask), at_first)
    save(uae, tmp_path / 'run', *flags)
    folder = f'{tmp_path}/plain'
    export_and_compare(folder, uae, x, *flags, f'--init_from={tmp_path}/run')
    close(plain_condition(folder, uae, y, mask), at_first)


# transformers' own: it says so of every config.json that still has the old name, as the hub's does
@pytest.mark.filterwarnings('ignore:`rope_scaling` is deprecated')
def test_export_keeps_the_base_models_own_files(tmp_path, x):
    """Whatever transformers would write: older libraries read rope_scaling and torch_dtype in it.

    Weights have the hub's names also if the base was saved under others, in shards with an index;
    and its folder's name is no pattern.
    """
    base = tmp_path / 'base[1]*'
    encoder, plain = base / 'encoder', tmp_path / 'plain[1]'
    shutil.copytree(BASE, base)
    with open(encoder / 'config.json') as f:
        own = json.load(f)
    own.update(architectures=['Qwen2_5_VLWithLongContext'], torch_dtype='bfloat16', house='ours')
    own.update(rope_scaling=dict(type='mrope', mrope_section=[4, 6, 6]))
    (encoder / 'config.json').write_text(json.dumps(own))
    (encoder / 'merges.txt').write_text('m e')
    renamed = {}
    for key, tensor in load_file(encoder / 'model.safetensors').items():
        if key.startswith('visual'):
            renamed[f'model.{key}'] = tensor
        else:
            renamed[key.replace('model.', 'model.language_model.', 1)] = tensor
    save_file(renamed, encoder / 'model.safetensors', metadata=dict(format='pt'))
    index = dict(metadata={}, weight_map=dict.fromkeys(renamed, 'model.safetensors'))
    (encoder / 'model.safetensors.index.json').write_text(json.dumps(index))
    flags = [f'--encoder={encoder}', f'--decoder={base}/decoder']
    names = export_and_compare(str(plain), load(*flags), x, *flags)
    assert names == load_file(f'{BASE}/encoder/model.safetensors').keys()
    with open(plain / 'config.json') as f:
        now = json.load(f)
    assert now == dict(own, architectures=['Qwen2_5_VLForConditionalGeneration'],
                       torch_dtype='float32', dtype='float32')
    for name in os.listdir(encoder):
        copied = name not in ('config.json', 'model.safetensors.index.json')
        if copied and name.endswith(('.json', '.txt', '.jinja')):
            assert (plain / name).read_bytes() == (encoder / name).read_bytes(), name
    assert not (plain / 'model.safetensors.index.json').exists(), "it is for the base's shards"


def test_export_of_a_full_checkpoint_and_a_hub_id(tmp_path, x, monkeypatch):
    """The base is a hub id, from the cache; the weights are the checkpoint's, not the base's."""
    cache = tmp_path / 'cache' / 'models--us--tiny'
    shutil.copytree(f'{BASE}/encoder', cache / 'snapshots' / ('0' * 40))
    (cache / 'refs').mkdir()
    (cache / 'refs' / 'main').write_text('0' * 40)
    for module in ('huggingface_hub.constants', 'transformers.utils.hub.constants'):
        monkeypatch.setattr(f'{module}.HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(f'{module}.HF_HUB_OFFLINE', True)
    uae = shake(load())
    save(uae, tmp_path / 'run', '--encoder=us/tiny')
    flags = ['--encoder=us/tiny', f'--init_from={tmp_path}/run']
    export_and_compare(f'{tmp_path}/plain', uae, x, *flags)


def test_export_of_a_release(release, tmp_path, x):
    """The authors' processor, where the release has one, is the one that is used and exported."""
    folder, truth = release
    shutil.copytree(folder, tmp_path / 'r')
    processor = tmp_path / 'r' / 'llm_processor'
    shutil.copytree(f'{BASE}/encoder', processor, ignore=shutil.ignore_patterns('*.safetensors'))
    (processor / 'config.json').write_text('{}')
    template = processor / 'chat_template.jinja'
    template.write_text('{# theirs #}' + template.read_text())
    export_and_compare(f'{tmp_path}/plain', truth, x, f'--init_from=uae:{tmp_path}/r')
    assert (tmp_path / 'plain' / 'chat_template.jinja').read_text().startswith('{# theirs #}')


def test_export_refuses_what_it_cannot_do(adapters, tmp_path):
    out, _ = adapters
    (tmp_path / 'used').mkdir()
    (tmp_path / 'used' / 'precious').write_text('x')
    assert f'{tmp_path}/used' in refusal(script, 'sample', f'--export={tmp_path}/used')
    assert os.listdir(tmp_path / 'used') == ['precious']
    export = f'--export={tmp_path}/a'
    assert 'lora_rank=4' in refusal(script, 'sample', export, f'--init_from={out}')
    assert '--prompt' in refusal(script, 'sample', export, '--prompt=x')
    assert not os.path.exists(tmp_path / 'a')
    below_a_file = f'{tmp_path}/used/precious/a'
    message = refusal(script, 'sample', f'--export={below_a_file}', '--device=cpu')
    assert f'{below_a_file} cannot be written' in message


# --- the plain pipeline, as docs/full_size.md shows it --------------------------------------------
def test_a_plain_pipeline_draws_what_we_draw_given_g_of_h_T(uae, sampled):
    """Its prompts are our conditions; with its own text encoders it would draw something else."""
    with torch.no_grad():
        c = uae.condition(*sampled[:2])[:2]
    decoder = at(uae, guidance=2.0).decoder
    own_texts = dict.fromkeys(('text_encoder', 'text_encoder_2', 'text_encoder_3', 'tokenizer',
                               'tokenizer_2', 'tokenizer_3'))
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=decoder.transformer, vae=decoder.vae,
        scheduler=copy.deepcopy(decoder.scheduler), **own_texts)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    z = torch.randn(len(c), *decoder.latent_shape(), generator=noise)
    pooled = decoder.pooled.expand(len(c), -1)
    negative = uae.negative()
    drawn = pipe(prompt_embeds=c, negative_prompt_embeds=negative.expand(len(c), -1, -1),
                 pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=pooled,
                 guidance_scale=2.0, num_inference_steps=4, latents=z, height=32, width=32,
                 output_type='pt').images
    with torch.no_grad():
        want = (decoder.to_image(decoder.draw(z, c, 4, negative)).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(drawn, want, atol=1e-5, rtol=1e-4)
