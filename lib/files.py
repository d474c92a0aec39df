"""Files that are whole or not there, and models from folders and hub ids."""
import contextlib
import json
import os

from safetensors import SafetensorError


def load(cls, source, **kwargs):
    """cls.from_pretrained with one clear line when the folder or hub id cannot be had."""
    try:
        return cls.from_pretrained(source, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = os.path.join(source, kwargs.get('subfolder', ''))
        lines = str(error).strip().splitlines() or ['']
        raise SystemExit(f'cannot load {cls.__name__} from {where!r}: {lines[0][:160]}')


def load_whole(cls, source, elsewhere=None, **kwargs):
    """`load` of a model, refused where weights are missing, or there and not the model's.

    The libraries go on with random ones. elsewhere(key): whether somebody else reads that key.
    """
    model, info = load(cls, source, output_loading_info=True, **kwargs)
    unknown = [key for key in info['unexpected_keys'] if not (elsewhere and elsewhere(key))]
    where = os.path.join(source, kwargs.get('subfolder', ''))
    for kind, keys in (('missing', info['missing_keys']), ('unknown', unknown)):
        if keys:
            raise SystemExit(f'{where}: {len(keys)} {kind} keys, first {min(keys)!r}')
    return model


def read_config(source, subfolder=''):
    """The config.json of a model's folder or hub id, a dict."""
    from transformers.utils import cached_file
    try:
        with open(cached_file(source, 'config.json', subfolder=subfolder)) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or ['']
        raise SystemExit(f'no config.json in {os.path.join(source, subfolder)!r}: {lines[0][:160]}')


@contextlib.contextmanager
def writing(path):
    """Context of a write, which a full disk ends in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:       # each writer has a name for it
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f'{path} cannot be written, what was there before is whole: {reason}')


def write_atomic(path, write):
    """write(temporary path), then rename: the file is whole or not there, also with two ranks."""
    temporary = f'{path}.{os.getpid()}.tmp'
    with writing(path):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        write(temporary)
        os.replace(temporary, path)


def write_lines(path, lines):
    """Writes strings, each with its own end of line."""
    with open(path, 'w') as f:
        f.writelines(lines)


def append_lines(path, records):
    """Adds records to a .jsonl file, a line each."""
    lines = [json.dumps(record) + '\n' for record in records]
    with writing(path), open(path, 'a') as f:
        f.writelines(lines)


def write_json(path, value, indent=1, **options):
    """A JSON file, whole or not there; options are those of json.dumps."""
    text = json.dumps(value, indent=indent, **options)
    write_atomic(path, lambda temporary: write_lines(temporary, [text]))
