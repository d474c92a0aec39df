"""Stage 2's captioner beside TRL's GRPOTrainer: speed, gradients, peak memory.

TRL lives in an environment of its own, never in requirements.txt (from the repository's root):

    python3 -m venv out/trlenv
    out/trlenv/bin/pip install -r requirements.txt trl==1.16.0
    export OMP_NUM_THREADS=1
    TRL="taskset -c 1 out/trlenv/bin/python tests/peers/trl_grpo.py"
    $TRL --batch=8 --group=8 --caption_len=24
    $TRL --batch=2 --group=8 --caption_len=32
    $TRL --batch=8 --group=8 --caption_len=24 --vocab=151936

The same on both sides: tiny Qwen2.5-VL, processor, pictures, prompt and reward callable (the share
of distinct tokens of a caption: the decoder would weigh the same on both sides), completions of
exactly caption_len tokens, float32, beta 0, loss_type grpo, one update per rollout, AdamW, vision
tower frozen. A step of each in turn; optimiser included, data left out. Prints captions per second,
the distance of the gradients on the same completions and peak memory, medians, and writes JSON to
the path given as --json=PATH.
"""
import copy
import os
import statistics
import sys
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import torch
from PIL import Image

import grpo_encoder
from bench.speed import clock, key_of, seconds, table
from config import parse
from data.images import open_data
from lib import checkpoint, files, optimiser, ranks
from tests.peers.full_logits import peak


def reward_of(completions):
    """The share of distinct tokens of each caption: lists of ids -> floats."""
    return [len(set(map(int, ids))) / len(ids) for ids in completions]


def widened(encoder, vocab):
    """The same architecture with another vocabulary, random weights."""
    if not vocab:
        return encoder
    config = copy.deepcopy(encoder.config)
    config.text_config.vocab_size = vocab
    torch.manual_seed(0)
    return type(encoder)(config).eval()


def open_stage(argv, vocab):
    """Stage 2 whose captioner has another vocabulary, if one is asked for."""
    config = parse(grpo_encoder.keys, grpo_encoder.own_presets, argv, __file__)
    run = ranks.start(config)
    uae = checkpoint.open_uae(config, run.device)
    encoder = uae.encoder
    encoder.vlm = widened(encoder.vlm, vocab)
    uae.requires_grad_(False)
    params = uae.train_only('encoder')
    encoder.forbidden = torch.zeros(encoder.head.weight.shape[0], dtype=torch.bool)
    encoder.forbidden[encoder.tokenizer.all_special_ids] = True     # captions cannot end
    train, _ = open_data(config, run)
    x = train.batch(config.seed, 0, config.batch)['x']
    return SimpleNamespace(config=config, uae=uae, x=x, G=config.group,
                           optimiser=optimiser.Optimiser(params, config))


def our_loss(stage, y=None):
    """The gradient of stage 2 with `reward_of` in the place of the decoder and its reward.

    y: completions given instead of sampled.
    """
    c, uae = stage.config, stage.uae
    B = len(stage.x) * stage.G
    mask = torch.ones(B, c.caption_len)
    with torch.no_grad():
        vision = uae.encoder.see(stage.x)
        if y is None:
            u = ranks.uniform((c.caption_len,), range(B), c.seed, 'token', 0)
            y, mask, old_logp = uae.encoder.sample(vision, stage.G, 1.0, u)
        else:
            old_logp = uae.encoder.logp(vision, y)
    r = torch.tensor(reward_of(y.tolist())).view(-1, stage.G)
    adv = grpo_encoder.group_advantage(r).flatten()
    logp = uae.encoder.logp(vision, y)
    loss, _ = grpo_encoder.policy_loss(logp, old_logp, adv, mask, c.clip_range)
    loss.backward()


def our_step(stage):
    our_loss(stage)
    stage.optimiser.step(0)


def trainer_of(captioner, stage, steps, callbacks=()):
    """TRL's trainer on the same pictures, for so many updates, and its data set."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    c = stage.config
    T = c.caption_len
    special = stage.uae.encoder.tokenizer.all_special_ids
    pictures = []
    for x in stage.x:
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte()
        pictures.append(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    content = [dict(type='text', text=c.caption_prompt), dict(type='image')]
    prompt = [dict(role='user', content=content)]
    args = GRPOConfig(
        output_dir='out/bench/trl', use_cpu=True, bf16=False, report_to='none',
        save_strategy='no', logging_strategy='no', disable_tqdm=True,
        per_device_train_batch_size=len(stage.x) * stage.G, num_generations=stage.G,
        max_completion_length=T, max_steps=steps, beta=0.0, loss_type='grpo', num_iterations=1,
        learning_rate=c.lr, lr_scheduler_type='constant', max_grad_norm=optimiser.GRAD_CLIP,
        temperature=1.0, top_p=1.0, top_k=0, shuffle_dataset=False,
        gradient_checkpointing=False, remove_unused_columns=False,
        generation_kwargs=dict(min_new_tokens=T, suppress_tokens=special))
    captioner.requires_grad_(False)
    captioner.model.language_model.requires_grad_(True)

    def reward(completion_ids, **others):
        return reward_of(completion_ids)

    data = Dataset.from_dict(dict(prompt=[prompt] * len(pictures), image=pictures))
    trainer = GRPOTrainer(captioner, reward, args=args, train_dataset=data,
                          processing_class=stage.uae.encoder.processor, callbacks=list(callbacks))
    return trainer, data


def speed(stage, captioner, steps):
    """Seconds of a step of each, in turn: TRL's own loop, our step after each of its steps."""
    from transformers import TrainerCallback
    theirs = []
    ours = []

    class Turn(TrainerCallback):
        def on_step_begin(self, *args, **others):
            self.start = clock()

        def on_step_end(self, *args, **others):
            theirs.append(clock() - self.start)
            ours.append(seconds(our_step, stage))

    trainer, _ = trainer_of(captioner, stage, steps + 2, [Turn()])
    trainer.train()
    return theirs[2:], ours[2:]


def gradients_differ(stage, captioner):
    """Relative Euclidean distance of the language model's gradients on the same completions."""
    uae = stage.uae
    B, T = len(stage.x) * stage.G, stage.config.caption_len
    allowed = (~uae.encoder.forbidden).nonzero().flatten()
    draws = torch.Generator().manual_seed(0)
    y = allowed[torch.randint(len(allowed), (B, T), generator=draws)]
    uae.encoder.forbidden.fill_(False)                   # TRL's normaliser has every token

    trainer, data = trainer_of(captioner, stage, 1)
    trainer._generate_single_turn = lambda *args, **others: (y.tolist(), None)
    captioner.train()
    captioner.zero_grad()
    rows = [data[i // stage.G] for i in range(B)]
    inputs = trainer._generate_and_score_completions(rows)
    image_tokens = uae.encoder.see(stage.x[:1])['features'].shape[1]
    prompt_len = len(uae.encoder.before_image) + image_tokens + len(uae.encoder.after_image)
    assert inputs['prompt_ids'].shape[1] == prompt_len, 'the prompts differ'
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(captioner, inputs).backward()

    uae.zero_grad()
    our_loss(stage, y)
    their_parameters = dict(captioner.model.language_model.named_parameters())
    ours = []
    theirs = []
    for name, parameter in uae.encoder.vlm.model.language_model.named_parameters():
        ours.append(parameter.grad.flatten().double())
        theirs.append(their_parameters[name].grad.flatten().double())
    a, b = torch.cat(ours), torch.cat(theirs)
    return ((a - b).norm() / b.norm()).item()


def main(argv):
    own = {}
    of_stage = []
    for argument in argv:
        if key_of(argument) in ('vocab', 'json', 'steps'):
            own[key_of(argument)] = argument.partition('=')[2]
        else:
            of_stage.append(argument)
    stage = open_stage(of_stage, int(own.get('vocab', 0)))
    encoder = stage.uae.encoder.vlm
    start = copy.deepcopy(encoder)
    B = len(stage.x) * stage.G
    out = dict(threads=torch.get_num_threads())

    theirs, ours = speed(stage, copy.deepcopy(start), int(own.get('steps', 7)))
    out['trl_captions_per_sec'] = B / statistics.median(theirs)
    out['ours_captions_per_sec'] = B / statistics.median(ours)
    out['ratio'] = statistics.median(their / our for their, our in zip(theirs, ours))

    encoder.load_state_dict(start.state_dict())
    trainer, _ = trainer_of(copy.deepcopy(start), stage, 1)
    out['trl_peak_bytes'] = peak(trainer.train, stage.x.device)
    stage.optimiser = optimiser.Optimiser(stage.optimiser.params, stage.config)
    out['ours_peak_bytes'] = peak(lambda: our_step(stage), stage.x.device)

    encoder.load_state_dict(start.state_dict())
    out['gradients_differ_by'] = gradients_differ(stage, copy.deepcopy(start))
    title = (f'TRL: {len(stage.x)} images x {stage.G} captions of '
             f'{stage.config.caption_len} tokens, V = {len(stage.uae.encoder.forbidden)}')
    table(title, {name: {'': value} for name, value in out.items()})
    if 'json' in own:
        files.write_json(own['json'], dict(out, argv=argv))


if __name__ == '__main__':
    main(sys.argv[1:])
