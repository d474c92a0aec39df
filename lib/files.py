"""Files that are whole or not there, and models from them."""
import json
import os

from safetensors import SafetensorError


def load(cls, path, **kwargs):
    """cls.from_pretrained with one clear line when the folder or hub id cannot be had."""
    try:
        return cls.from_pretrained(path, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = os.path.join(path, kwargs.get('subfolder', ''))
        lines = str(error).strip().splitlines() or ['']
        raise SystemExit(f'cannot load {cls.__name__} from {where!r}: {lines[0][:160]}')


def write_atomic(path, write):
    """write(temporary path), then rename: the file is whole or not there, also with two ranks."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    temporary = f'{path}.{os.getpid()}.tmp'
    write(temporary)
    os.replace(temporary, path)


def write_lines(path, lines):
    """Writes strings, each with its own end of line."""
    with open(path, 'w') as f:
        f.writelines(lines)


def write_json(path, value, indent=1, **options):
    """A JSON file, whole or not there; options are those of json.dumps."""
    text = json.dumps(value, indent=indent, **options)
    write_atomic(path, lambda temporary: write_lines(temporary, [text]))
