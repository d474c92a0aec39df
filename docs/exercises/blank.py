"""Eleven functions of the method to write yourself; the tests are the grader.

Statements and hints: docs/exercises/README.md.

    python docs/exercises/blank.py                      # all of them, and what grades each
    python docs/exercises/blank.py sde_step             # the body goes; the docstring stays
    python docs/exercises/blank.py sde_step --wrong=2   # the second of three typical mistakes
    python docs/exercises/blank.py sde_step --restore   # the code as it was

Only bodies are exchanged, in the working tree: every other edit of yours in the same files stays,
and an answer of your own is kept.
"""
import ast
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = 'out/exercises'                  # the original bodies, and your answers

# where: file:function. grader: test ids. wrong: (in words, old text, new text); every occurrence
# of the old text in the bodies is replaced
EXERCISES = dict(
    group_advantage=dict(
        where=['grpo_encoder.py:group_advantage', 'grpo_decoder.py:group_advantage'],
        grader=['test_losses.py::test_advantage_hand_table',
                'test_losses.py::test_advantage_of_equal_rewards_is_exactly_zero'],
        wrong=[('the mean of the whole batch instead of the group',
                'r.mean(1, keepdim=True)', 'r.mean()'),
               ('the population standard deviation, divided by G instead of G - 1',
                'r.std(1, keepdim=True)', 'r.std(1, keepdim=True, unbiased=False)'),
               ('no guard for equal rewards: rounding in their mean, over 1e-4, is an advantage',
                'torch.where(equal, 0.0, centred)', 'centred')]),
    policy_loss=dict(
        where=['grpo_encoder.py:policy_loss', 'grpo_decoder.py:policy_loss'],
        grader=['test_losses.py::test_surrogate_hand_table',
                'test_losses.py::test_the_three_means_over_tokens',
                'test_losses.py::test_masked_tokens_weigh_nothing'],
        wrong=[('the clipped term alone, without the minimum',
                'torch.min(ratios * A, clipped * A)', 'clipped * A'),
               ('the mean over all entries, padding among them',
                '-(gain * weight).sum() / total_weight', '-(gain * weight).mean()'),
               ('masked only at the end, when a -inf behind the end is a nan already',
                'torch.where(mask > 0, logp - old_logp, 0.0)', 'logp - old_logp')]),
    kl_k3=dict(
        where=['grpo_encoder.py:kl_k3'],
        grader=['test_losses.py::test_k3'],
        wrong=[('the plain log-ratio (k1), which may be negative', 'd.exp() - d - 1', '-d'),
               ('d upside down', 'ref_logp - logp', 'logp - ref_logp'),
               ('half the square (k2), which is biased', 'd.exp() - d - 1', 'd ** 2 / 2')]),
    sde_step=dict(
        where=['decoder.py:sde_step'],
        grader=['test_sde.py::test_flow_mean_and_std', 'test_sde.py::test_cps_mean_and_std',
                'test_sde.py::test_logp_is_the_mean_log_density'],
        wrong=[('flow: the ODE with noise on top, no drift to make up for it',
                'z * z_scale + v * v_scale * dt', 'z + v * dt'),
               ('cps: fresh noise without taking as much of the old away',
                'torch.sqrt(s_next ** 2 - std ** 2) * eps', 's_next * eps'),
               ('a density without its normaliser',
                ' - torch.log(safe) - 0.5 * math.log(2 * math.pi)', '')]),
    caption_logp=dict(
        where=['encoder.py:pick_logp', 'encoder.py:token_logp', 'encoder.py:Encoder.logp'],
        grader=['test_logp.py::test_chunks_change_nothing',
                'test_logp.py::test_recorded_equals_rescored[0.7]'],
        wrong=[('the temperature of the sampling left out',
                'y, temperature, self.forbidden)', 'y, 1.0, self.forbidden)'),
               ('off by one: each token scored by the state that has read it',
                'self.caption_states(vision, y)[:, :-1]', 'self.caption_states(vision, y)[:, 1:]'),
               ('forbidden tokens at logit 0 instead of -inf: they keep a share of the probability',
                'masked_fill_(forbidden, -math.inf)', 'masked_fill_(forbidden, 0.0)')]),
    projector=dict(
        where=['model.py:Projector.__init__', 'model.py:Projector.forward'],
        grader=['test_condition.py::test_projector_is_two_linear_layers_and_a_gelu'],
        wrong=[('a ReLU for the GELU', 'F.gelu(', 'F.relu('),
               ('a hidden layer of width D instead of 2D: no checkpoint fits', '2 * D', 'D'),
               ('nothing between the two layers, which are then one',
                'F.gelu(self.up(states))', 'self.up(states)')]),
    preprocess=dict(
        where=['reward.py:preprocess'],
        grader=['test_reward.py::test_preprocess_is_pil_s',
                'test_reward.py::test_preprocess_of_the_right_size_only_normalises'],
        wrong=[('shrunk without the antialiasing filter', 'antialias=True', 'antialias=False'),
               ('[-1, 1] taken for [0, 1]', 'x.float() * 0.5 + 0.5', 'x.float()'),
               ('the corner cropped instead of the centre',
                'corner((n - crop) / 2) for n', '0 for n')]),
    cold_start=dict(
        where=['cold_start.py:reconstruction_loss', 'decoder.py:Decoder.draw'],
        grader=['test_logp.py::test_draw_has_gradients_of_its_last_steps_only',
                'test_gradients.py::'
                'test_the_semantic_loss_reaches_decoder_projector_and_language_model'],
        wrong=[('the condition detached: projector and language model learn nothing',
                'uae.condition(y, mask, vision)', 'uae.condition(y, mask, vision).detach()'),
               ('the latent detached on its way into the network: no chain from step to step',
                'self.velocity(z, sigmas[step]', 'self.velocity(z.detach(), sigmas[step]'),
               ('a gradient in the first steps instead of the last',
                'step >= S - grad_steps', 'step < grad_steps')]),
    condition=dict(
        where=['model.py:UAE.condition', 'encoder.py:Encoder.image_states'],
        grader=['test_condition.py::test_answer_is_the_caption_s_states_after_the_image',
                'test_condition.py::test_image_does_not_see_the_caption',
                'test_condition.py::test_image_states_stand_at_the_image_s_positions',
                'test_condition.py::test_text_and_image_are_both'],
        wrong=[("answer: the states that predict the tokens instead of the tokens' own",
                'self.encoder.caption_states(vision, y)[:, 1:]',
                'self.encoder.caption_states(vision, y)[:, :-1]'),
               ('image: the first N positions, where the template stands',
                'start = len(self.before_image)', 'start = 0'),
               ('image: the images in turn instead of each to its whole group',
                '.repeat_interleave(len(y) // len(c_img), 0)',
                '.repeat(len(y) // len(c_img), 1, 1)')]),
    reca=dict(
        where=['reca.py:both_losses'],
        grader=['test_reca.py::test_loss_is_flow_matching_twice'],
        wrong=[('the velocity upside down: from noise to image', 'eps - z0', 'z0 - eps'),
               ('image and noise mixed the wrong way round',
                '(1 - noise) * z0 + noise * eps', 'noise * z0 + (1 - noise) * eps'),
               ('lambda_t2i forgotten', 'config.lambda_t2i * f_y', 'f_y')]),
    nft_loss=dict(
        where=['nft_decoder.py:nft_loss'],
        grader=['test_nft.py::test_the_loss_by_hand',
                'test_nft.py::test_the_gradient_goes_towards_good_drawings_and_away_from_bad_ones'],
        wrong=[('v- on the same side of the old velocity as v+',
                '(1 + beta) * v_old - beta * v', '(1 - beta) * v_old + beta * v'),
               ('a gradient through w, which halves the step',
                'off.detach()', 'off'),
               ('one w for the whole batch: noisy levels drown the others',
                'mean((1, 2, 3), keepdim=True)', 'mean()')]))


def read(path):
    return (ROOT / path).read_bytes().decode()


def write(path, text):
    """Writes beside and renames: a kill leaves the old file or the new one."""
    (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / f'{path}.new').write_bytes(text.encode())
    os.replace(ROOT / f'{path}.new', ROOT / path)


def split(where):
    """file:function or file:Class.function -> the text before the body, the body, the text after.

    The body begins behind the docstring.
    """
    path, name = where.split(':')
    lines = read(path).splitlines(keepends=True)
    try:
        node = ast.parse(''.join(lines))
    except SyntaxError as error:
        raise SystemExit(f'{path}, line {error.lineno}: {error.msg}; a body is found only in a '
                         'file that parses, mend that line first')
    for part in name.split('.'):
        found = [child for child in node.body if getattr(child, 'name', None) == part]
        if not found:
            raise SystemExit(f'{path}: no {name} there; it has to keep its name')
        node = found[0]
    first = node.body[0].lineno - 1
    if ast.get_docstring(node, clean=False) is not None:
        first = node.body[0].end_lineno
    last = node.end_lineno
    return ''.join(lines[:first]), ''.join(lines[first:last]), ''.join(lines[last:])


def variants(name, original):
    """The stub and the three wrong answers, each {where: body}, of the original bodies."""
    stub = f"raise NotImplementedError('exercise {name}: docs/exercises/README.md')\n"
    blank = {}
    for where, body in original.items():
        margin = re.match(r'\s*', body)[0].rsplit('\n', 1)[-1]
        blank[where] = margin + stub
    found = [blank]
    for _, old, new in EXERCISES[name]['wrong']:
        found.append({where: body.replace(old, new) for where, body in original.items()})
    return found


def keep_answer(name, bodies):
    """Writes the bodies into a new file under KEPT -> its path."""
    number = 1
    while (ROOT / f'{KEPT}/{name}.answer{number}.txt').exists():
        number += 1
    path = f'{KEPT}/{name}.answer{number}.txt'
    write(path, ''.join(f'# {where}\n{body}' for where, body in bodies.items()))
    return path


def exchange(name, number=None):
    """Puts variant `number` in place, None: the original.

    An answer that stood there is kept in the file whose path is returned, else ''.
    """
    kept = f'{KEPT}/{name}.json'
    now = {where: split(where)[1] for where in EXERCISES[name]['where']}
    under_way = (ROOT / kept).exists()
    if number is None and not under_way:
        raise SystemExit(f'{name} is not blank: nothing to restore')
    original = now
    if under_way:
        original = json.loads(read(kept))
    planted = variants(name, original)
    if original in planted:
        raise SystemExit(f'{name}: what stands in {" ".join(now)} is not the original code, from '
                         'which the wrong answers are made')
    answer = ''
    if now not in (original, *planted):
        answer = keep_answer(name, now)
    write(kept, json.dumps(original, indent=1))
    chosen = original
    if number is not None:
        chosen = planted[number]
    for where, body in chosen.items():          # one after the other: two may stand in one file
        before, _, after = split(where)
        write(where.split(':')[0], before + body + after)
    if number is None:
        os.remove(ROOT / kept)
    return answer


def grading(name):
    """The command that grades an exercise."""
    tests = []
    for test in EXERCISES[name]['grader']:
        path = f'tests/{test}'
        if '[' in path:
            path = f"'{path}'"
        tests.append(path)
    return 'python -m pytest -q ' + ' '.join(tests)


def print_all():
    print(__doc__)
    for name, exercise in EXERCISES.items():
        print(name)
        print(f'    in         {" ".join(exercise["where"])}')
        print(f'    graded by  {grading(name)}')
        for number, (said, _, _) in enumerate(exercise['wrong'], 1):
            print(f'    --wrong={number}  {said}')


def main(argv):
    if not argv or argv[0] in ('--help', '-h', '--list'):
        return print_all()
    name, *options = argv
    if name not in EXERCISES:
        raise SystemExit(f'no exercise {name!r}; there are: {" ".join(EXERCISES)}')
    numbers = {'': 0, '--wrong=1': 1, '--wrong=2': 2, '--wrong=3': 3, '--restore': None}
    option = ' '.join(options)
    if option not in numbers:
        raise SystemExit('expected nothing, --wrong=1, --wrong=2, --wrong=3 or --restore after '
                         f'{name}, got {option!r}')
    number = numbers[option]
    answer = exchange(name, number)
    exercise = EXERCISES[name]
    said = 'the original is back'
    if number == 0:
        said = f'now to be written, in {" ".join(exercise["where"])}'
    elif number:
        said = f'wrong on purpose, {exercise["wrong"][number - 1][0]}'
    if answer:
        said += f'; your answer is kept in {answer}'
    print(f'{name}: {said}')
    print(f'graded by  {grading(name)}')


if __name__ == '__main__':
    main(sys.argv[1:])
