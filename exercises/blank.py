"""Ten functions of the method to write yourself; the tests are the grader. Statements and hints: exercises/README.md.

    python exercises/blank.py                           # the ten, where each stands and what grades it
    python exercises/blank.py sde_step                  # its body becomes a stub that raises; signature and docstring stay
    python exercises/blank.py sde_step --wrong=2        # the second of three typical wrong answers, to see the grader object
    python exercises/blank.py sde_step --restore        # the code as it was

Only bodies are exchanged, in the working tree: every other edit of yours in the same files stays, and an answer of your own is kept.
"""
import ast
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = 'out/exercises'                           # the original bodies, and your answers

# where: file:function; grader: test ids; wrong: (in words, old text, new text), every occurrence in the bodies is replaced
EXERCISES = dict(
    group_advantage=dict(where='grpo_encoder.py:group_advantage grpo_decoder.py:group_advantage',
        grader='test_losses.py::test_advantage_hand_table test_losses.py::test_advantage_of_equal_rewards_is_exactly_zero',
        wrong=(('the mean of the whole batch instead of the group', 'r.mean(1, keepdim=True)', 'r.mean()'),
               ('the population standard deviation, divided by G instead of G - 1', 'r.std(1, keepdim=True)', 'r.std(1, keepdim=True, unbiased=False)'),
               ('no guard for equal rewards: rounding in their mean, over 1e-4, is an advantage', 'torch.where(equal, 0.0, ', 'torch.where(equal, centred / 1e-4, '))),
    policy_loss=dict(where='grpo_encoder.py:policy_loss grpo_decoder.py:policy_loss',
        grader='test_losses.py::test_surrogate_hand_table test_losses.py::test_loss_is_the_mean_over_valid_tokens test_losses.py::test_masked_tokens_weigh_nothing',
        wrong=(('the clipped term alone, without the minimum', 'torch.min(ratio * a, clipped * a)', 'clipped * a'),
               ('the mean over all entries, padding among them', '(gain * mask).sum() / count, stats', '(gain * mask).mean(), stats'),
               ('masked only at the end, when a -inf behind the end is a nan already', 'torch.where(valid, logp - old_logp, 0.0).exp()', '(logp - old_logp).exp()'))),
    kl_k3=dict(where='grpo_encoder.py:kl_k3',
        grader='test_losses.py::test_k3',
        wrong=(('the plain log-ratio (k1), which may be negative', 'd.exp() - d - 1', '-d'),
               ('d upside down', 'ref_logp - logp', 'logp - ref_logp'),
               ('half the square (k2), which is biased', 'd.exp() - d - 1', 'd ** 2 / 2'))),
    sde_step=dict(where='model.py:sde_step',
        grader='test_sde.py::test_flow_mean_and_std test_sde.py::test_cps_mean_and_std test_sde.py::test_logp_is_the_mean_log_density',
        wrong=(('flow: the ODE with noise on top, no drift to make up for it', 'z * (1 + sigma ** 2 / (2 * s) * dt) + v * (1 + sigma ** 2 * (1 - s) / (2 * s)) * dt', 'z + v * dt'),
               ('cps: fresh noise without taking as much of the old away', 'torch.sqrt(s_next ** 2 - std ** 2) * eps', 's_next * eps'),
               ('a density without its normaliser', ' - torch.log(safe) - 0.5 * math.log(2 * math.pi)', ''))),
    caption_logp=dict(where='model.py:pick_logp model.py:token_logp model.py:UAE.caption_logp',
        grader='test_logp.py::test_chunks_change_nothing test_logp.py::test_recorded_equals_rescored[0.7]',
        wrong=(('the temperature of the sampling left out', 'y, temperature, self.forbidden)', 'y, 1.0, self.forbidden)'),
               ('off by one: each token scored by the state that has read it', 'self.caption_states(seen, y)[:, :-1]', 'self.caption_states(seen, y)[:, 1:]'),
               ('forbidden tokens at logit 0 instead of -inf: they keep a share of the probability', 'masked_fill_(forbidden, -math.inf)', 'masked_fill_(forbidden, 0.0)'))),
    projector=dict(where='model.py:Projector.__init__ model.py:Projector.forward',
        grader='test_condition.py::test_projector_is_two_linear_layers_and_a_gelu',
        wrong=(('a ReLU for the GELU', 'F.gelu(', 'F.relu('),
               ('a hidden layer of width D instead of 2D: no checkpoint fits', '2 * D', 'D'),
               ('nothing between the two layers, which are then one', 'F.gelu(self.up(h))', 'self.up(h)'))),
    preprocess=dict(where='reward.py:preprocess',
        grader='test_reward.py::test_preprocess_is_pil_s test_reward.py::test_preprocess_of_the_right_size_only_normalises',
        wrong=(('shrunk without the antialiasing filter', 'antialias=True', 'antialias=False'),
               ('[-1, 1] taken for [0, 1]', 'x.float() * 0.5 + 0.5', 'x.float()'),
               ('the corner cropped instead of the centre', 'corner((n - crop) / 2) for n', '0 for n'))),
    cold_start=dict(where='cold_start.py:reconstruction_loss model.py:UAE.draw',
        grader='test_logp.py::test_draw_has_the_gradient_of_the_whole_chain_behind_its_start '
               'test_gradients.py::test_the_semantic_loss_reaches_decoder_projector_and_language_model',
        wrong=(('the condition detached: projector and language model learn nothing', 'uae.condition(y, mask, seen)', 'uae.condition(y, mask, seen).detach()'),
               ('the latent detached on its way into the network: no chain from step to step', 'self.velocity(z, sig[i]', 'self.velocity(z.detach(), sig[i]'),
               ('a gradient in the first steps instead of the last', 'i >= S - grad_steps', 'i < grad_steps'))),
    condition=dict(where='model.py:UAE.condition',
        grader='test_condition.py::test_answer_is_the_caption_s_states_after_the_image test_condition.py::test_image_does_not_see_the_caption '
               'test_condition.py::test_image_states_stand_at_the_image_s_positions test_condition.py::test_text_and_image_are_both',
        wrong=(("answer: the states that predict the tokens instead of the tokens' own", 'self.caption_states(seen, y)[:, 1:]', 'self.caption_states(seen, y)[:, :-1]'),
               ('image: the first N positions, where the template stands', 'start = len(self.before_image)', 'start = 0'),
               ('image: the images in turn instead of each to its whole group', '.repeat_interleave(len(y) // len(h), 0)', '.repeat(len(y) // len(h), 1, 1)'))),
    reca=dict(where='reca.py:loss_of',
        grader='test_reca.py::test_loss_is_flow_matching_twice',
        wrong=(('the velocity upside down: from noise to image', 'eps - z0', 'z0 - eps'),
               ('image and noise mixed the wrong way round', '(1 - s_) * z0 + s_ * eps', 's_ * z0 + (1 - s_) * eps'),
               ('lambda_t2i forgotten', 'c.lambda_t2i * f_y', 'f_y'))))


def read(path):
    return (ROOT / path).read_bytes().decode()


def write(path, text):
    """Writes beside and renames: a kill leaves the old file or the new one."""
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / f'{path}.new').write_bytes(text.encode())
    os.replace(ROOT / f'{path}.new', ROOT / path)


def split(where):
    """file:function or file:Class.function -> its file's text before the body, the body behind the docstring, and the text after it."""
    path, name = where.split(':')
    lines = read(path).splitlines(keepends=True)
    try:
        node = ast.parse(''.join(lines))
    except SyntaxError as e:
        raise SystemExit(f'{path}, line {e.lineno}: {e.msg}; a body is found only in a file that parses, mend that line first')
    for part in name.split('.'):
        node = next((n for n in node.body if getattr(n, 'name', None) == part), None)
        if node is None:
            raise SystemExit(f'{path}: no {name} there; it has to keep its name')
    first = node.body[0].end_lineno if ast.get_docstring(node, clean=False) is not None else node.body[0].lineno - 1
    return tuple(''.join(part) for part in (lines[:first], lines[first:node.end_lineno], lines[node.end_lineno:]))


def variants(name, original):
    """The stub and the three wrong answers, each {where: body}, of an exercise's original bodies."""
    stub = f"raise NotImplementedError('exercise {name}: write this body, see exercises/README.md')\n"
    return [{where: re.match(r'\s*', body)[0].rsplit('\n', 1)[-1] + stub for where, body in original.items()},
            *({where: body.replace(old, new) for where, body in original.items()} for _, old, new in EXERCISES[name]['wrong'])]


def exchange(name, number=None):
    """Puts variant `number` in place, None: the original. An answer that stood there is kept in the file whose path is returned, else ''."""
    kept, answer, wheres = f'{KEPT}/{name}.json', '', EXERCISES[name]['where'].split()
    under_way, now = (ROOT / kept).exists(), {where: split(where)[1] for where in wheres}
    if number is None and not under_way:
        raise SystemExit(f'{name} is not blank: nothing to restore')
    original = json.loads(read(kept)) if under_way else now
    planted = variants(name, original)
    if original in planted:
        raise SystemExit(f'{name}: what stands in {" ".join(wheres)} is not the original code, from which the wrong answers are made')
    if now not in (original, *planted):
        answer = next(path for n in range(1, 10 ** 6) if not (ROOT / (path := f'{KEPT}/{name}.answer{n}.txt')).exists())
        write(answer, ''.join(f'# {where}\n{body}' for where, body in now.items()))
    write(kept, json.dumps(original, indent=1))
    for where, body in (original if number is None else planted[number]).items():          # one after the other: two may stand in one file
        before, _, after = split(where)
        write(where.split(':')[0], before + body + after)
    if number is None:
        os.remove(ROOT / kept)
    return answer


def main(argv):
    name, *words = argv or ['--help']
    command = {n: 'python -m pytest -q ' + ' '.join(f"'tests/{g}'" if '[' in g else f'tests/{g}' for g in e['grader'].split()) for n, e in EXERCISES.items()}
    if name in ('--help', '-h', '--list'):
        return print(__doc__, *(f'{n}\n    in         {e["where"]}\n    graded by  {command[n]}\n' + '\n'.join(
            f'    --wrong={i}  {said}' for i, (said, *_) in enumerate(e['wrong'], 1)) for n, e in EXERCISES.items()), sep='\n')
    if name not in EXERCISES:
        raise SystemExit(f'no exercise {name!r}; there are: {" ".join(EXERCISES)}')
    if words not in ([], ['--wrong=1'], ['--wrong=2'], ['--wrong=3'], ['--restore']):
        raise SystemExit(f'expected nothing, --wrong=1, --wrong=2, --wrong=3 or --restore after {name}, got {" ".join(words)!r}')
    number = None if words == ['--restore'] else int(words[0][-1]) if words else 0
    answer, exercise = exchange(name, number), EXERCISES[name]
    said = f'wrong on purpose, {exercise["wrong"][number - 1][0]}' if number else f'now to be written, in {exercise["where"]}'
    print(f'{name}: ' + ('the original is back' if number is None else said) + f'; your answer is kept in {answer}' * bool(answer))
    print(f'graded by  {command[name]}')


if __name__ == '__main__':
    main(sys.argv[1:])
