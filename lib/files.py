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


def load_known(known, source, dtype, subfolder='', elsewhere=None):
    """`load_whole` of a model in the class that its config.json names.

    known: {transformers' model_type or diffusers' _class_name: our class that drives such a model}.
    """
    import diffusers
    from transformers import AutoModelForImageTextToText
    from transformers.utils import cached_file
    where = os.path.join(source, subfolder)
    try:
        with open(cached_file(source, 'config.json', subfolder=subfolder)) as f:
            about = json.load(f)
    except (OSError, ValueError) as error:
        raise SystemExit(f'no model in {where!r}: {str(error).strip().splitlines()[0][:160]}')
    kind = about.get('_class_name') or about.get('model_type')
    if kind not in known:
        raise SystemExit(f'{where}: a model of the kind {kind}, expected one of '
                         f'{" ".join(known)}; another takes a class of its own (docs/exchange.md)')
    if '_class_name' in about:
        return load_whole(getattr(diffusers, kind), source, elsewhere, subfolder=subfolder,
                          torch_dtype=dtype)
    return load_whole(AutoModelForImageTextToText, source, elsewhere, subfolder=subfolder,
                      dtype=dtype)


@contextlib.contextmanager
def writing(path):
    """Context of a write, which a full disk ends in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:       # each writer has a name for it
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f'{path} cannot be written (is the disk full?), what was there before is '
                         f'whole: {reason}')


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
