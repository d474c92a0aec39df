"""The key `tracker`: wandb and TensorBoard, where one of them was asked for."""
import numpy as np
from PIL import Image


def open_tracker(config):
    """-> publish(fields, step, sheet): numbers, and the path of a picture if there is one."""
    kind, _, project = config.tracker.partition(':')
    if kind == 'wandb':
        return open_wandb(config, project)
    return open_tensorboard(f'{config.out_dir}/tensorboard')


def open_wandb(config, project):
    import wandb
    run = wandb.init(project=project, config=vars(config))

    def publish(fields, step, sheet=''):
        if sheet:
            fields = dict(fields, samples=wandb.Image(sheet))
        run.log(fields, step=step)

    return publish


def open_tensorboard(folder):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(folder)

    def publish(fields, step, sheet=''):
        for name, value in fields.items():
            writer.add_scalar(name, value, step)
        if sheet:
            with Image.open(sheet) as picture:
                pixels = np.asarray(picture)                        # (height, width, 3)
            writer.add_image('samples', pixels, step, dataformats='HWC')
        writer.flush()

    return publish
