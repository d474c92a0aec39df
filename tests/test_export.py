"""What other tools read: the decoder's LoRA in a plain SD3 pipeline, the encoder's in peft, exported folders in plain library
classes; and what others wrote: the authors' released layout. Outputs agree to 1e-5 with the model in memory."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import config
from conftest import ROOT, perturb
from model import UAE
from running import refusal, script, tiny

BASE = f'{ROOT}/data/shapes/base'


def load(*words):
    """A UAE as a script with these words on its command line would have it."""
    common.quiet()
    return UAE(config.parse({}, {}, list(words), 'x.py'))


def shake(uae, what='', scale=0.05):
    """Noise on every weight of encoder, decoder and projector whose name contains `what`, so that none is trivial."""
    for tower in (uae.encoder, uae.decoder, uae.projector):
        for i, (name, p) in enumerate(tower.named_parameters()):
            if what in name:
                with torch.no_grad():
                    p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return uae


def velocity(decoder, uae):
    """One forward pass of an SD3 transformer on fixed inputs."""
    g = torch.Generator().manual_seed(3)
    z, c = torch.randn(2, *uae.latent_shape(), generator=g), torch.randn(2, 5, decoder.config.joint_attention_dim, generator=g)
    with torch.no_grad():
        return decoder(hidden_states=z, timestep=torch.tensor([300.0, 900.0]), encoder_hidden_states=c,
                       pooled_projections=uae.pooled.expand(2, -1), return_dict=False)[0]


def logits(encoder, processor, x):
    """Logits of an image and a question, the inputs made by the processor as an evaluation harness makes them."""
    messages = [dict(role='user', content=[dict(type='image'), dict(type='text', text='describe the image')])]
    text = processor.apply_chat_template([messages[0]], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[((x + 1) * 127.5).round().byte()], return_tensors='pt')
    with torch.no_grad():
        return encoder(**inputs).logits


def close(a, b, tol=1e-5):
    """Equal to 1e-5; of the largest entry, since the tiny model's logits reach 11."""
    assert a.shape == b.shape and (a - b).abs().max() < tol * max(1, b.abs().max()), ((a - b).abs().max(), b.abs().max())


# --- the adapters of a checkpoint ----------------------------------------------------------------
@pytest.fixture(scope='module')
def adapters(tmp_path_factory):
    """A run's checkpoint with LoRA of rank 4, its adapters then shaken and saved again: (folder, the model in memory)."""
    out = tmp_path_factory.mktemp('lora') / 'run'
    tiny('grpo_decoder', out, '--lora_rank=4', steps=1)
    uae = shake(load('--lora_rank=4', f'--init_from={out}'), 'lora_', 0.03)
    uae.save(f'{out}/step_000001')
    return str(out), uae


def test_decoder_lora_in_a_plain_pipeline(adapters):
    """Its alpha of twice the rank travels in the file's metadata: without it the pipeline would halve the adapter."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    out, uae = adapters
    parts = dict(transformer=SD3Transformer2DModel, vae=AutoencoderKL, scheduler=FlowMatchEulerDiscreteScheduler)
    parts = {name: cls.from_pretrained(f'{BASE}/decoder', subfolder=name) for name, cls in parts.items()}
    none = dict.fromkeys(('text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2', 'text_encoder_3', 'tokenizer_3'))
    pipe = StableDiffusion3Pipeline(**parts, **none)
    pipe.transformer.float()
    before = velocity(pipe.transformer, uae)
    pipe.load_lora_weights(f'{out}/step_000001/decoder')
    close(velocity(pipe.transformer, uae), velocity(uae.decoder, uae))
    assert (before - velocity(uae.decoder, uae)).abs().max() > 0.05, 'the adapter does something'
    pipe.fuse_lora()
    close(velocity(pipe.transformer, uae), velocity(uae.decoder, uae))


def test_encoder_lora_in_plain_peft(adapters, x):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration
    out, uae = adapters
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(f'{BASE}/encoder', dtype=torch.float32)
    before = logits(plain, uae.processor, x[0])
    model = PeftModel.from_pretrained(plain, f'{out}/step_000001/encoder')
    close(logits(model, uae.processor, x[0]), logits(uae.encoder, uae.processor, x[0]))
    assert (before - logits(uae.encoder, uae.processor, x[0])).abs().max() > 0.05


# --- the authors' release ------------------------------------------------------------------------
def split(tensors, folder, stem, n):
    """n shards and their index, as save_pretrained leaves them."""
    os.makedirs(folder, exist_ok=True)
    names = sorted(tensors)
    files = {name: f'{stem}-{i % n + 1:05d}-of-{n:05d}.safetensors' for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({k: tensors[k].contiguous().clone() for k in names if files[k] == file}, f'{folder}/{file}', metadata=dict(format='pt'))
    with open(f'{folder}/{stem}.safetensors.index.json', 'w') as f:
        json.dump(dict(metadata={}, weight_map=files), f)


def hub(name):
    """The name that hub checkpoints and transformers 4 give a parameter of ours."""
    return name.replace('model.visual.', 'visual.').replace('model.language_model.', 'model.')


def wrapped(name, lora):
    """The name of a parameter after peft has been put around `.model`, as the release's script does."""
    name = name.replace('model.', 'model.base_model.model.', 1) if name.startswith('model.') else name
    return name.replace('.weight', '.base_layer.weight').replace('.bias', '.base_layer.bias') if name.removesuffix('.weight').removesuffix('.bias') in lora else name


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    """A made-up release of the tiny model: (folder, the model it holds). llm and dit are one thing, stage 2 and 3 another."""
    folder = str(tmp_path_factory.mktemp('uae'))
    uae = shake(load())
    truth = shake(load(), scale=0.03)
    llm = {k: v for k, v in uae.encoder.state_dict().items() if k != 'lm_head.weight'}
    order = dict(up='0', down='2')
    projector = [{f'projector.{order[k.split(".")[0]]}.{k.split(".")[1]}': v for k, v in u.projector.state_dict().items()} for u in (uae, truth)]
    split({**{hub(k): v for k, v in llm.items()}, **projector[0]}, f'{folder}/llm', 'model', 3)
    for name in ('config.json', 'generation_config.json'):
        shutil.copy(f'{BASE}/encoder/{name}', f'{folder}/llm')
    uae.decoder.save_pretrained(f'{folder}/dit')

    g = torch.Generator().manual_seed(7)
    linear = [n for n, m in truth.encoder.model.named_modules(prefix='model') if isinstance(m, torch.nn.Linear)]
    pairs, stage2 = {}, truth.encoder.state_dict()
    full = {wrapped(k, linear): v.clone() for k, v in stage2.items() if k != 'lm_head.weight'}
    for name in linear:
        out, into = stage2[f'{name}.weight'].shape
        A, B = torch.randn(4, into, generator=g) / 8, torch.randn(out, 4, generator=g) / 16
        pairs.update({f'{wrapped(name, ())}.lora_A.default.weight': A, f'{wrapped(name, ())}.lora_B.default.weight': B})
        stage2[f'{name}.weight'].add_(2 * B @ A)
    split({**full, **pairs, **projector[1]}, f'{folder}/llm_lora', 'model', 3)

    truth.decoder.load_state_dict(uae.decoder.state_dict())
    from peft import LoraConfig, get_peft_model
    peft = get_peft_model(truth.decoder, LoraConfig(r=4, lora_alpha=12, target_modules=['to_q', 'to_k', 'add_v_proj']))
    for p in peft.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g) / 8
    peft.save_pretrained(f'{folder}/dit_lora')
    truth.decoder = peft.merge_and_unload()
    return folder, truth


def test_release_is_read(release, x):
    """llm_lora wins over llm, its LoRA pairs are added at 64 / 32, dit_lora at its own alpha / rank, and the projector comes along."""
    folder, truth = release
    uae = load(f'--init_from=uae:{folder}')
    close(logits(uae.encoder, uae.processor, x[0]), logits(truth.encoder, uae.processor, x[0]))
    close(velocity(uae.decoder, uae), velocity(truth.decoder, truth))
    h = torch.randn(3, uae.projector.up.in_features, generator=torch.Generator().manual_seed(1))
    close(uae.projector(h), truth.projector(h))


def test_release_without_its_adapters(release, tmp_path, x):
    folder, truth = release
    for part in ('llm', 'dit'):
        os.symlink(f'{folder}/{part}', tmp_path / part)
    uae, first = load(f'--init_from=uae:{tmp_path}'), shake(load())
    close(logits(uae.encoder, uae.processor, x[0]), logits(first.encoder, uae.processor, x[0]))
    close(velocity(uae.decoder, uae), velocity(first.decoder, first))


def test_adapters_trained_on_a_release_stand_on_it(release, tmp_path, x):
    """Their checkpoint holds adapters alone, so every later run has to find the release below them, not the hub's models."""
    folder, truth = release
    shutil.copytree(folder, tmp_path / 'r')
    still = ['--lr=0.0', '--lora_rank=2']
    tiny('grpo_decoder', tmp_path / 'a', f'--init_from=uae:{tmp_path}/r', *still, steps=1)
    tiny('grpo_decoder', tmp_path / 'b', f'--init_from={tmp_path}/a', *still, steps=1)
    tiny('grpo_decoder', tmp_path / 'full', f'--init_from=uae:{tmp_path}/r', '--lr=0.0', steps=1)
    uae = load(f'--init_from={tmp_path}/b', '--lora_rank=2')
    close(logits(uae.encoder, uae.processor, x[0]), logits(truth.encoder, uae.processor, x[0]))
    close(velocity(uae.decoder, uae), velocity(truth.decoder, truth))
    shutil.rmtree(tmp_path / 'r')
    assert f'{tmp_path}/r' in refusal(load, f'--init_from={tmp_path}/b', '--lora_rank=2')
    full = load(f'--init_from={tmp_path}/full')
    close(velocity(full.decoder, full), velocity(truth.decoder, truth))


@pytest.mark.parametrize('key, name, factor', [
    ('model.layers.0.mlp.up_proj.weight', 'model.language_model.layers.0.mlp.up_proj.weight', ''),
    ('model.language_model.norm.weight', 'model.language_model.norm.weight', ''),
    ('language_model.model.embed_tokens.weight', 'model.language_model.embed_tokens.weight', ''),
    ('visual.blocks.0.norm1.weight', 'model.visual.blocks.0.norm1.weight', ''),
    ('module.model.visual.merger.mlp.0.bias', 'model.visual.merger.mlp.0.bias', ''),
    ('model.base_model.visual.merger.mlp.2.base_layer.bias', 'model.visual.merger.mlp.2.bias', ''),
    ('model.base_model.model.layers.3.mlp.up_proj.lora_B.default.weight', 'model.language_model.layers.3.mlp.up_proj.weight', 'B'),
    ('model.base_model.model.visual.blocks.0.attn.qkv.lora_A.default.weight', 'model.visual.blocks.0.attn.qkv.weight', 'A'),
    ('module.lm_head.weight', 'lm_head.weight', ''), ('projector.0.weight', 'projector.up.weight', ''), ('projector.2.bias', 'projector.down.bias', ''),
    ('base_model.model.transformer_blocks.1.attn.to_out.0.lora_A.weight', 'transformer_blocks.1.attn.to_out.0.weight', 'A'),
    ('transformer.transformer_blocks.1.attn.to_q.lora_B.weight', 'transformer_blocks.1.attn.to_q.weight', 'B')])
def test_key_map(key, name, factor):
    assert common.released_key(key) == (name, factor)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=dict(format='pt'))


def drop(tensors):
    del tensors[[k for k in sorted(tensors) if 'projector' not in k][-1]]


@pytest.mark.parametrize('part, change, says', [
    ('llm', drop, '1 missing keys'), ('dit', drop, '1 missing keys'),
    ('llm', lambda t: t.update(odd=torch.zeros(1)), "1 unknown keys, first 'odd'"), ('dit', lambda t: t.update(odd=torch.zeros(1)), "first 'odd'"),
    ('llm_lora', lambda t: t.update(odd=torch.zeros(1)), "odd: unknown key"), ('dit_lora', lambda t: t.update(odd=torch.zeros(1)), 'odd: unknown key'),
    ('llm_lora', lambda t: t.pop([k for k in sorted(t) if 'lora_B' in k][0]), 'half a LoRA pair'),
    ('llm_lora', lambda t: t.update({k: v[:2] for k, v in t.items() if 'embed' in k or 'norm' in k}), 'shape (2,'),
    ('dit_lora', lambda t: t.update({k: v[:, :3].contiguous() for k, v in t.items() if 'lora_A' in k}), 'LoRA pair at'),
    ('llm', lambda t: [t.pop(k) for k in list(t) if 'projector' in k], 'expected projector.0 and projector.2')])
def test_release_that_does_not_fit(release, tmp_path, part, change, says):
    shutil.copytree(release[0], tmp_path / 'r')
    folder = tmp_path / 'r' / part
    for path in sorted(folder.glob('*.safetensors'))[:1 if 'projector' not in says else None]:
        rewrite(path, change)
    message = refusal(load, f'--init_from=uae:{tmp_path}/r')
    assert str(folder) in message and says in message


def test_release_with_parts_gone(release, tmp_path):
    assert 'no folder llm' in refusal(load, f'--init_from=uae:{tmp_path}')
    shutil.copytree(release[0], tmp_path / 'r')
    os.remove(tmp_path / 'r' / 'llm_lora' / 'model-00002-of-00003.safetensors')
    assert 'model-00002-of-00003.safetensors is missing' in refusal(load, f'--init_from=uae:{tmp_path}/r')
    with open(tmp_path / 'r' / 'dit_lora' / 'adapter_config.json', 'w') as f:
        json.dump(dict(r=4, lora_alpha=8, use_dora=True), f)
    os.rename(tmp_path / 'r' / 'llm_lora', tmp_path / 'away')
    assert 'use_dora' in refusal(load, f'--init_from=uae:{tmp_path}/r')


# --- sample.py --export --------------------------------------------------------------------------
def export_and_compare(folder, uae, x, *words):
    """Exports with these words; the plain classes, without a word on precision, give what the model in memory gives."""
    from diffusers import SD3Transformer2DModel
    from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    script('sample', f'--export={folder}', f'--out_dir={folder}_out', '--device=cpu', *words)
    plain, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    close(logits(plain, AutoProcessor.from_pretrained(folder), x[0]), logits(uae.encoder, uae.processor, x[0]))
    assert AutoTokenizer.from_pretrained(folder)('red circle').input_ids == uae.tokenizer('red circle').input_ids
    close(velocity(SD3Transformer2DModel.from_pretrained(f'{folder}/decoder', subfolder='transformer'), uae), velocity(uae.decoder, uae))
    saved = load_file(f'{folder}/decoder/projector.safetensors')
    assert saved.keys() == uae.projector.state_dict().keys() and all(torch.equal(v, saved[k]) for k, v in uae.projector.state_dict().items())
    return {k for name in os.listdir(folder) if name.endswith('.safetensors') for k in load_file(f'{folder}/{name}')}


def test_export_of_adapters(adapters, tmp_path, x):
    out, uae = adapters
    names = export_and_compare(f'{tmp_path}/new/plain', uae, x, '--lora_rank=4', f'--init_from={out}')
    assert not os.path.exists(f'{tmp_path}/new/plain.tmp')
    hubs = load_file(f'{BASE}/encoder/model.safetensors').keys()
    assert names == hubs, 'the names of the hub, no lora, no projector that vLLM would trip over, no copy of tied weights'


def test_export_keeps_the_base_models_own_files(tmp_path, x, capsys):
    """Whatever transformers would write: harnesses with older libraries read rope_scaling and torch_dtype from it. Weights have
    the hub's names also if the checkpoint was saved under others, in shards with an index if there is much."""
    base = tmp_path / 'base'
    shutil.copytree(BASE, base)
    with open(base / 'encoder' / 'config.json') as f:
        own = json.load(f)
    own.update(architectures=['Qwen2_5_VLWithLongContext'], torch_dtype='bfloat16', rope_scaling=dict(type='mrope', mrope_section=[4, 6, 6]), house='ours')
    (base / 'encoder' / 'config.json').write_text(json.dumps(own))
    (base / 'encoder' / 'merges.txt').write_text('m e')
    (base / 'encoder' / 'model.safetensors.index.json').write_text('{}')
    tensors = load_file(base / 'encoder' / 'model.safetensors')
    tensors = {('model.' + k if k.startswith('visual') else k.replace('model.', 'model.language_model.', 1)): v for k, v in tensors.items()}
    save_file(tensors, base / 'encoder' / 'model.safetensors', metadata=dict(format='pt'))
    (base / 'encoder' / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={k: 'model.safetensors' for k in tensors})))
    words = [f'--encoder={base}/encoder', f'--decoder={base}/decoder']
    names = export_and_compare(f'{tmp_path}/plain', load(*words), x, *words)
    assert names == load_file(f'{BASE}/encoder/model.safetensors').keys()
    with open(tmp_path / 'plain' / 'config.json') as f:
        now = json.load(f)
    assert now == dict(own, architectures=['Qwen2_5_VLForConditionalGeneration'], torch_dtype='float32', dtype='float32')
    for name in os.listdir(base / 'encoder'):
        if name.endswith(('.json', '.txt', '.jinja')) and name not in ('config.json', 'model.safetensors.index.json'):
            assert (tmp_path / 'plain' / name).read_bytes() == (base / 'encoder' / name).read_bytes(), name
    assert not (tmp_path / 'plain' / 'model.safetensors.index.json').exists(), "the base's index is for the base's shards"


def test_export_of_a_full_checkpoint_and_a_hub_id(tmp_path, x, monkeypatch):
    """The base given as a hub id, from the cache; and the weights are the checkpoint's, not the base's."""
    cache = tmp_path / 'cache' / 'models--us--tiny'
    shutil.copytree(f'{BASE}/encoder', cache / 'snapshots' / ('0' * 40))
    (cache / 'refs').mkdir()
    (cache / 'refs' / 'main').write_text('0' * 40)
    for module in ('huggingface_hub.constants', 'transformers.utils.hub.constants'):
        monkeypatch.setattr(f'{module}.HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(f'{module}.HF_HUB_OFFLINE', True)
    from running import words
    uae = load()
    shake(uae)
    uae.save(f'{tmp_path}/run/step_000001')
    c = config.parse({}, {}, ['--encoder=us/tiny'], 'x.py')
    (tmp_path / 'run' / 'step_000001' / 'meta.json').write_text(json.dumps(dict(step=1, config=vars(c))))
    export_and_compare(f'{tmp_path}/plain', uae, x, '--encoder=us/tiny', f'--init_from={tmp_path}/run')


def test_export_of_a_release(release, tmp_path, x):
    """The authors' processor, where the release has one, is the one that is used and exported."""
    folder, truth = release
    shutil.copytree(folder, tmp_path / 'r')
    shutil.copytree(f'{BASE}/encoder', tmp_path / 'r' / 'llm_processor', ignore=shutil.ignore_patterns('*.safetensors'))
    (tmp_path / 'r' / 'llm_processor' / 'config.json').write_text('{}')
    template = tmp_path / 'r' / 'llm_processor' / 'chat_template.jinja'
    template.write_text('{# theirs #}' + template.read_text())
    export_and_compare(f'{tmp_path}/plain', truth, x, f'--init_from=uae:{tmp_path}/r')
    assert (tmp_path / 'plain' / 'chat_template.jinja').read_text().startswith('{# theirs #}')


def test_export_shards_as_the_hub_does(tmp_path, monkeypatch):
    import huggingface_hub
    really = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(huggingface_hub, 'save_torch_state_dict', lambda *a, **kw: really(*a, **dict(kw, max_shard_size='1MB')))
    script('sample', f'--export={tmp_path}/plain', '--device=cpu')
    from transformers import Qwen2_5_VLForConditionalGeneration
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(f'{tmp_path}/plain')
    assert os.path.exists(f'{tmp_path}/plain/model.safetensors.index.json') and not os.path.exists(f'{tmp_path}/plain/model.safetensors')
    for (k, a), b in zip(plain.state_dict().items(), load().encoder.state_dict().values()):
        assert torch.equal(a, b), k


def test_export_refuses_what_it_cannot_do(adapters, tmp_path):
    out, _ = adapters
    (tmp_path / 'used').mkdir()
    (tmp_path / 'used' / 'precious').write_text('x')
    assert f'{tmp_path}/used' in refusal(lambda: script('sample', f'--export={tmp_path}/used'))
    assert os.listdir(tmp_path / 'used') == ['precious']
    assert 'lora_rank=4' in refusal(lambda: script('sample', f'--export={tmp_path}/a', f'--init_from={out}'))
    assert '--prompt' in refusal(lambda: script('sample', f'--export={tmp_path}/a', '--prompt=x'))
    assert not os.path.exists(tmp_path / 'a')
