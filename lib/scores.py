"""What the stages and the benchmarks measure with: image -> caption -> image, and its scores.

Sampling is the ODE. Start noise and the captions' uniforms are functions of an image's index alone:
two models, or one model at two steps, are compared on the same randomness. Beside the tower that is
the reward stands one that never is (`judge`). In the embedded world captions and images are counted
too, against the truth about each scene.
"""
import torch
from tqdm import tqdm

from lib import ranks, watch
from lib.files import append_lines
from reward import backbone, clip_reward, reward_tower


def images_at_once(config):
    """How many images are captioned and drawn together; what draws them goes by micro_batch.

    With cond_len 0 one by one: what is drawn together is padded together.
    """
    if not config.cond_len:
        return 1
    return 64


def warn_of_losses(what, lost, config):
    """One line for what a text loses on its way to tokens; lost: see `Encoder.tokens`."""
    if lost.get('cut'):
        print(f'warning: of {what} {lost["cut"]} with more tokens than cond_len='
              f'{config.cond_len} has room for, which were cut')
    if lost.get('unknown'):
        print(f'warning: of {what} {lost["unknown"]} words are not in the tokenizer')


@torch.no_grad()
def reconstruct(uae, x, rows, temperature=0.0, drawn=True, seed=()):
    """x (n, 3, R, R) -> captions (list of n), token counts (n,), x_hat (n, 3, R, R).

    rows: the n images' indices; they and `seed`, a tuple, decide all randomness. Temperature 0 is
    greedy. x_hat is None if not `drawn`.
    """
    vision = uae.encoder.see(x)
    uniforms = ranks.uniform((uae.config.caption_len,), rows, 'eval', 'token', *seed)
    y, mask, _ = uae.encoder.sample(vision, 1, temperature, uniforms.to(uae.device))
    lengths = uae.encoder.words(y, mask).sum(1)
    x_hat = None
    if drawn:
        x_hat = draw_captions(uae, y, mask, rows, vision, seed)
    return uae.encoder.texts(y, mask), lengths, x_hat


@torch.no_grad()
def draw_captions(uae, y, mask, rows, vision=None, seed=()):
    """Captions y, mask (n, T) -> images (n, 3, R, R); the same start noise as in `reconstruct`."""
    z = ranks.normal(uae.decoder.latent_shape(), rows, 'eval', 'start', *seed).to(uae.device)
    c = uae.condition(y, mask, vision)
    return uae.draw(z, c, uae.config.eval_denoise_steps).clamp(-1, 1)


@torch.no_grad()
def draw_edits(uae, source, instructions, rows, seed=()):
    """Source images (n, 3, R, R) -> images of which the instructions hold, (n, 3, R, R)."""
    y, mask, _ = uae.encoder.tokens(instructions)
    return draw_captions(uae, y, mask, rows, uae.encoder.see(source.to(uae.device)), seed)


class Evaluator:
    """Scores a UAE on fixed held-out images; every rank takes a share of them.

    held: the images, from data.images.open_data; where they have sources, their captions are
    instructions and what is scored are edits. towers: of 'reward' and 'judge' those that are loaded
    already, for example {'reward': tower}; the others are loaded here. log: a run's Log, which
    publishes what `every` finds. temperature: of the captions, 0 = greedy.
    """

    def __init__(self, uae, held, config, run, towers=None, log=None, temperature=0.0):
        self.uae, self.held, self.config, self.run = uae, held, config, run
        self.towers = dict(towers or {})
        self.log = log
        self.temperature = temperature
        if config.eval_every:           # a tower that is not there is missed before any work
            self.open_towers()

    def open_towers(self):
        """Loads what is not there yet."""
        if 'reward' not in self.towers:
            self.towers['reward'] = reward_tower(self.config, self.run.device)
        if 'judge' not in self.towers and self.config.judge:
            judge = self.towers['reward'].part('judge')         # --reward=judge has it already
            self.towers['judge'] = judge or backbone('judge', self.config, self.run.device)

    def records(self, rows):
        """One dict for each of these images: caption, scores, what an oracle reads in it.

        Those of the first watch.WATCHED images have `pictures`, source and reconstruction.
        """
        x = self.held['x'][rows].to(self.uae.device)
        if 'source' in self.held:
            texts = [self.held['captions'][row] or '' for row in rows]
            x_hat = draw_edits(self.uae, self.held['source'][rows], texts, rows)
            y, mask, _ = self.uae.encoder.tokens(texts)
            lengths = self.uae.encoder.words(y, mask).sum(1)
        else:
            texts, lengths, x_hat = reconstruct(self.uae, x, rows, self.temperature)
        measured = dict(caption_len=lengths, mse=(x - x_hat).square().flatten(1).mean(1))
        for name, tower in self.towers.items():
            measured[name] = clip_reward(x, x_hat, tower, texts)
        measured = {name: values.tolist() for name, values in measured.items()}

        records = []
        for k, row in enumerate(rows):
            record = dict(row=row, name=self.held['names'][row], caption=texts[k])
            for name, values in measured.items():
                record[name] = values[k]
            if row < watch.WATCHED:
                record['pictures'] = watch.to_bytes(torch.stack([x[k], x_hat[k]]))
            records.append(record)
        if self.held['scenes']:
            self.read_scenes(records, rows, x, x_hat)
        return records

    def read_scenes(self, records, rows, x, x_hat):
        """Adds what an oracle reads in x_hat and in an image of the true caption, and a caption
        sampled at temperature 1: the policy itself, as training samples it."""
        from data.shapes import scenes as world
        truth = [world.caption(self.held['scenes'][row]) for row in rows]
        y, mask, _ = self.uae.encoder.tokens(truth)
        from_truth = draw_captions(self.uae, y, mask, rows, self.uae.encoder.see(x))
        sampled, _, _ = reconstruct(self.uae, x, rows, 1.0, drawn=False)
        read_own = world.read(x_hat.cpu())
        read_true = world.read(from_truth.cpu())
        for k, record in enumerate(records):
            scene = self.held['scenes'][rows[k]]
            record.update(read_own=read_own[k], read_true=read_true[k], sampled=sampled[k],
                          truth=truth[k], false=world.false_phrases(record['caption'], scene))

    def __call__(self):
        """-> (summary {name: number}, records of all images in order); the same on every rank."""
        self.open_towers()
        mine = list(range(self.run.rank, len(self.held['x']), self.run.world))
        records = []
        at_once = images_at_once(self.config)
        for start in range(0, len(mine), at_once):
            records += self.records(mine[start:start + at_once])
        records = ranks.gather_objects(records, self.run)
        records.sort(key=lambda record: record['row'])

        summary = {}
        for name in (*self.towers, 'mse', 'caption_len'):
            summary[name] = sum(record[name] for record in records) / len(records)
        if self.held['scenes']:
            from data.shapes import scenes as world
            summary.update(world.measures(records, self.held['scenes']))
        return summary, records

    def due(self, step):
        """Whether an evaluation follows once `step` updates are done."""
        every = self.config.eval_every
        return every > 0 and (step == self.config.steps or step % every == 0)

    def every(self, step):
        """Evaluates where it is due; prints, appends to eval.jsonl, and keeps pictures."""
        if not self.due(step):
            return
        summary, records = self()
        if not self.run.master:
            return
        numbers = ' '.join(f'{name} {value:.3f}' for name, value in summary.items())
        tqdm.write(f'eval {step:4d} | {numbers}')
        append_lines(f'{self.config.out_dir}/eval.jsonl', [dict(step=step, **summary)])
        sheet = watch.save_samples(records, step, self.config.out_dir)
        if self.log:
            fields = {f'eval/{name}': value for name, value in summary.items()}
            self.log.publish(fields, step, sheet)
