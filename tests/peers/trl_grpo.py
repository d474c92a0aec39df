"""Stage 2's captioner beside TRL's GRPOTrainer: captions per second, gradients on the same completions, peak memory.

TRL lives in an environment of its own, never in requirements.txt (from the repository's root):
    python3 -m venv out/trlenv && out/trlenv/bin/pip install -r requirements.txt trl==1.16.0
    taskset -c 1 env OMP_NUM_THREADS=1 out/trlenv/bin/python tests/peers/trl_grpo.py --prompts=8 --group=8 --caption_len=24
    ...                                                                              --prompts=2 --group=8 --caption_len=32
    ...                                                                              --prompts=8 --group=8 --caption_len=24 --vocab=151936

The same tiny Qwen2.5-VL, processor, pictures, prompt and reward callable (the share of distinct tokens of a caption: the decoder would weigh the same on
both sides), completions of exactly caption_len tokens, float32, beta 0, loss_type grpo, one update per rollout, AdamW, vision tower frozen on both
sides. A step of each in turn; optimiser included, data left out. Prints medians and writes JSON to the path given as --json=PATH.
"""
import copy
import json
import os
import statistics
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import torch
from PIL import Image

import bench
import common
import grpo_encoder
from tests.peers.full_logits import peak


def reward_of(ids):
    """The share of distinct tokens of each caption: lists of ids -> floats."""
    return [len(set(map(int, row))) / len(row) for row in ids]


def widened(encoder, vocab):
    """The same architecture with another vocabulary, random weights."""
    if not vocab:
        return encoder
    cfg = copy.deepcopy(encoder.config)
    cfg.text_config.vocab_size = vocab
    torch.manual_seed(0)
    return type(encoder)(cfg).eval()


def ours_step(m, optimise=True, y=None):
    """One step of stage 2 with `reward_of` for the decoder and its reward; y: completions given instead of sampled."""
    c, uae, B = m.c, m.uae, len(m.x) * m.G
    with torch.no_grad():
        seen = uae.see(m.x)
        old, mask = None, torch.ones(B, c.caption_len)
        if y is None:
            u = common.uniform((c.caption_len,), range(B), c.seed, 'token', 0)
            y, mask, old = uae.sample_captions(seen, m.G, 1.0, u)
        else:
            old = uae.caption_logp(seen, y)
    adv = grpo_encoder.group_advantage(torch.tensor(reward_of(y.tolist())).view(-1, m.G)).flatten()
    uae(grpo_encoder.loss_of, seen, y, mask, old, old, adv, 1 / mask.sum(), c)[0].backward()
    if optimise:
        common.optimise(m.opt, m.params, 0, c)


def trainer_of(model, m, steps, callbacks=()):
    """TRL's trainer on the same pictures; `steps` updates."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    P, G, T = len(m.x), m.G, m.c.caption_len
    special = m.uae.tokenizer.all_special_ids
    pictures = [Image.fromarray(((x + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()) for x in m.x]
    prompt = [dict(role='user', content=[dict(type='text', text=m.c.caption_prompt), dict(type='image')])]
    args = GRPOConfig(output_dir='out/bench/trl', use_cpu=True, bf16=False, report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True,
                      per_device_train_batch_size=P * G, num_generations=G, max_completion_length=T, max_steps=steps, beta=0.0, loss_type='grpo', num_iterations=1,
                      learning_rate=m.c.lr, lr_scheduler_type='constant', max_grad_norm=m.c.grad_clip, temperature=1.0, top_p=1.0, top_k=0, shuffle_dataset=False,
                      gradient_checkpointing=False, generation_kwargs=dict(min_new_tokens=T, suppress_tokens=special), remove_unused_columns=False)
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    data = Dataset.from_dict(dict(prompt=[prompt] * P, image=pictures))
    return GRPOTrainer(model, lambda completion_ids, **_: reward_of(completion_ids), args=args, train_dataset=data, processing_class=m.uae.processor,
                       callbacks=list(callbacks)), data


def speed(m, model, steps):
    """Seconds of a step of each, in turn: TRL's own loop, our step after each of its steps."""
    from transformers import TrainerCallback
    trl, ours = [], []

    class Turn(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = bench.clock()

        def on_step_end(self, *_, **__):
            trl.append(bench.clock() - self.start)
            ours.append(bench.seconds(lambda: ours_step(m)))

    trainer_of(model, m, steps + 2, [Turn()])[0].train()
    return trl[2:], ours[2:]


def gradients(m, model):
    """Relative Euclidean distance of the language model's gradients on the same completions."""
    B, T = len(m.x) * m.G, m.c.caption_len
    allowed = (~m.uae.forbidden).nonzero().flatten()
    y = allowed[torch.randint(len(allowed), (B, T), generator=torch.Generator().manual_seed(0))]
    m.uae.forbidden.fill_(False)                 # TRL's normaliser has every token
    trainer, data = trainer_of(model, m, 1)
    trainer._generate_single_turn = lambda *_, **__: (y.tolist(), None)
    model.train(), model.zero_grad(), m.opt.zero_grad()
    rows = [data[i // m.G] for i in range(B)]
    inputs = trainer._generate_and_score_completions(rows)
    length = len(m.uae.before_image) + m.uae.see(m.x[:1])[0].shape[1] + len(m.uae.after_image)
    assert inputs['prompt_ids'].shape[1] == length, 'the prompts differ'
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(model, inputs).backward()
    ours_step(m, False, y)
    theirs = dict(model.model.language_model.named_parameters())
    pairs = [(p.grad.flatten().double(), theirs[k].grad.flatten().double()) for k, p in m.uae.encoder.model.language_model.named_parameters()]
    a, b = (torch.cat(t) for t in zip(*pairs))
    return ((a - b).norm() / b.norm()).item()


def main(argv):
    own = dict(w[2:].split('=') for w in argv if w.split('=')[0] in ('--vocab', '--json', '--steps'))
    words = [w for w in argv if w[2:].split('=')[0] not in own]
    m = bench.prepare(types.SimpleNamespace(random=False), 'grpo_encoder', words)
    m.uae.encoder = widened(m.uae.encoder, int(own.get('vocab', 0)))
    m.uae.requires_grad_(False)
    m.params = m.uae.train_only('encoder')
    m.opt = torch.optim.AdamW(m.params, lr=m.c.lr, weight_decay=0.0, fused=True)
    m.uae.forbidden = torch.zeros(m.uae.head.weight.shape[0], dtype=torch.bool)
    m.uae.forbidden[m.uae.tokenizer.all_special_ids] = True
    start = copy.deepcopy(m.uae.encoder)
    B, out = len(m.x) * m.G, dict(argv=argv, threads=torch.get_num_threads())
    trl, ours = speed(m, copy.deepcopy(start), int(own.get('steps', 7)))
    out.update(trl_captions_per_sec=B / statistics.median(trl), ours_captions_per_sec=B / statistics.median(ours),
               ratio=statistics.median(t / o for t, o in zip(trl, ours)))
    m.uae.encoder.load_state_dict(start.state_dict())
    out.update(trl_peak_bytes=peak(trainer_of(copy.deepcopy(start), m, 1)[0].train, m.x.device))
    m.opt = torch.optim.AdamW(m.params, lr=m.c.lr, weight_decay=0.0, fused=True)
    out.update(ours_peak_bytes=peak(lambda: ours_step(m), m.x.device))
    m.uae.encoder.load_state_dict(start.state_dict())
    out.update(gradients_differ_by=gradients(m, copy.deepcopy(start)))
    bench.table(f'TRL: {len(m.x)} images x {m.G} captions of {m.c.caption_len} tokens, V = {len(m.uae.forbidden)}', {k: {'': v} for k, v in out.items() if k != 'argv'})
    if 'json' in own:
        common.write_atomic(own['json'], lambda path: common.write_lines(path, [json.dumps(out, indent=1)]))


if __name__ == '__main__':
    main(sys.argv[1:])
