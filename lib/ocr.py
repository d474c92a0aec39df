"""The reward `ocr`: how alike the text is that is read in two images; where it was asked for."""
import importlib.util
import math

import torch
from torch import nn


def edit_distance(a, b):
    """Fewest insertions, deletions and replacements of a letter that make b of a (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            replaced = above[j - 1] + (letter != other)
            row.append(min(replaced, above[j] + 1, row[-1] + 1))
    return row[-1]


class Ocr(nn.Module):
    """The reward `ocr`: how alike the text is that RapidOCR reads in source and reconstruction.

    Fewer than SHORTEST letters are no text: a wheel reads as 0 (docs/results.md).
    """
    SHORTEST = 3

    def __init__(self):
        super().__init__()
        for package in ('rapidocr', 'onnxruntime'):
            if not importlib.util.find_spec(package):
                raise SystemExit(f'--reward=ocr: there is no {package} here; '
                                 'pip install rapidocr onnxruntime')
        from rapidocr import RapidOCR
        threads = 'EngineConfig.onnxruntime.intra_op_num_threads'
        options = {threads: torch.get_num_threads(), 'Global.log_level': 'error'}
        self.engine = RapidOCR(params=options)

    def read(self, image):
        """image (3, H, W) in [-1, 1] -> its letters and digits, lines from the top."""
        pixels = ((image.detach().clamp(-1, 1) + 1) * 127.5).round().byte()
        bgr = pixels.flip(0).permute(1, 2, 0)                # the colours in OpenCV's order
        lines = self.engine(bgr.cpu().numpy()).txts or ()
        return ''.join(filter(str.isalnum, ''.join(lines)))

    def reward(self, x, x_hat, captions=None):
        """1 - edit distance / length of the longer text: (B,), NaN where x_i has no text."""
        r = []
        for image, group in zip(x, x_hat.chunk(len(x))):
            source = self.read(image)
            for drawn in group:
                alike = math.nan
                if len(source) >= self.SHORTEST:
                    text = self.read(drawn)
                    alike = 1 - edit_distance(source, text) / max(len(source), len(text))
                r.append(alike)
        return torch.tensor(r, device=x_hat.device)
