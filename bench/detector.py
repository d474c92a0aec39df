"""GenEval's eyes: a detector of COCO's 80 classes, and CLIP as the namer of an object's colour.

The network comes from transformers; the test pipeline before it and the post-processing behind it
are mmdetection's, which the official scorer uses.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lib.files import load
from bench.prompts import CLASSES, COLOURS

# mmdetection's normalisation of pixels in [0, 255]
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
SHORTER_SIDE = 800
LONGER_SIDE = 1333
MULTIPLE = 32                                # the network's input is padded to this
LEAST_SCORE = 0.3
LEAST_SCORE_COUNTING = 0.9
MOST_OF_A_CLASS = 16
GREY = (153, 153, 153)                       # around an object whose colour is asked


# --- objects -----------------------------------------------------------------------------------
def open_detector(config, device):
    from transformers import Mask2FormerForUniversalSegmentation
    model = load(Mask2FormerForUniversalSegmentation, config.detector).eval().to(device)
    names = model.config.id2label
    fits = len(names) == len(CLASSES)
    if fits:                                 # some of the names between are spelt otherwise
        fits = names[0] == CLASSES[0] and names[79] == CLASSES[79]
    if not fits:
        raise SystemExit(
            f'--detector={config.detector}: expected the 80 classes of COCO instances, '
            f'got {len(names)}, from {names[0]!r}')
    return model


def to_detector(image):
    """RGB image -> (1, 3, h, w) normalised and padded, and the (h, w) of the image in it."""
    width, height = image.size
    longer, shorter = max(height, width), min(height, width)
    scale = min(LONGER_SIDE / longer, SHORTER_SIDE / shorter)
    inside = int(height * scale + 0.5), int(width * scale + 0.5)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    # as cv2 resizes: not antialiased, back to 8 bits
    x = F.interpolate(x, inside, mode='bilinear', align_corners=False).round()
    mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD).view(3, 1, 1)
    x = (x - mean) / std
    below, right = -inside[0] % MULTIPLE, -inside[1] % MULTIPLE
    return F.pad(x, (0, right, 0, below)), inside


def resize(masks, size):
    return F.interpolate(masks, size, mode='bilinear', align_corners=False)


def instances(class_logits, mask_logits, padded, inside, size, most=100):
    """Logits of Q queries (Q, C + 1) and (Q, h, w) -> the n best instances, best first.

    -> scores (n,), labels (n,), boxes (n, 4), masks (n, *size) bool. Best are the `most` best
    (query, class) pairs, so that a query can count as several classes. A score is the class's
    probability times the mask's mean probability inside itself. padded, inside, size: (height,
    width) of the network's input, of the image in it, of the image.
    """
    classes = class_logits.shape[1] - 1      # the last one is: no object
    probabilities = class_logits.softmax(-1)[:, :-1].flatten()
    scores, pair = probabilities.topk(min(most, len(probabilities)))
    query, labels = pair // classes, pair % classes

    logits = resize(mask_logits[None], padded)[:, :, :inside[0], :inside[1]]
    logits = resize(logits, size)[0]
    masks = logits > 0
    area = masks.flatten(1).sum(1)
    mass = (logits.sigmoid() * masks).flatten(1).sum(1)
    sureness = mass / (area + 1e-6)

    masks = masks.cpu()
    boxes = torch.stack([box_of(mask) for mask in masks])
    scores, order = (scores * sureness[query]).cpu().sort(descending=True)
    query, labels = query.cpu()[order], labels.cpu()[order]
    return scores, labels, boxes[query], masks[query]


def box_of(mask):
    """(H, W) bool -> (x0, y0, x1, y1) around what is True, zeros where nothing is."""
    if not mask.any():
        return torch.zeros(4)
    ys = mask.any(1).nonzero()
    xs = mask.any(0).nonzero()
    top, bottom = ys.min(), ys.max() + 1
    left, right = xs.min(), xs.max() + 1
    return torch.tensor([left, top, right, bottom]).float()


@torch.no_grad()
def detect(model, image, tag):
    """{class: [(box, score, mask)]}, best first; counting asks for surer ones than the others."""
    x, inside = to_detector(image)
    out = model(pixel_values=x.to(model.device))
    class_logits = out.class_queries_logits[0].float()
    mask_logits = out.masks_queries_logits[0].float()
    size = image.height, image.width
    seen = instances(class_logits, mask_logits, x.shape[-2:], inside, size)
    if tag == 'counting':
        least = LEAST_SCORE_COUNTING
    else:
        least = LEAST_SCORE
    found = {}
    for score, label, box, mask in zip(*seen):
        if score > least:
            same_class = found.setdefault(CLASSES[label], [])
            if len(same_class) < MOST_OF_A_CLASS:
                same_class.append((box.tolist(), score.item(), mask.numpy()))
    return found


# --- their colours -----------------------------------------------------------------------------
def open_colours(config, device):
    """-> name_colours(image, [(box, score, mask)], class), with CLIP's choice among COLOURS."""
    import open_clip
    name, _, weights = config.colour_clip.partition(':')
    if weights == 'openai' and 'quickgelu' not in name:
        raise SystemExit(
            f'--colour_clip={config.colour_clip}: OpenAI\'s weights need QuickGELU: '
            f'{name}-quickgelu:openai')
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=weights, device=device)
    except Exception as e:
        first = str(e).splitlines()[0][:160]
        raise SystemExit(f'--colour_clip={config.colour_clip}: cannot be loaded: {first}')
    return colour_namer(model.eval(), transform, open_clip.get_tokenizer(name), device)


def colour_namer(model, transform, tokenizer, device):
    """The function of `open_colours` over any CLIP."""
    heads = {}                               # by class

    def colour_head(name):
        """(10, d): unit mean over three templates of the colours' unit text features."""
        templates = (f'a photo of a {{}} {name}', f'a photo of a {{}}-colored {name}',
                     'a photo of a {} object')
        texts = []
        for colour in COLOURS:
            texts += [template.format(colour) for template in templates]
        features = model.encode_text(tokenizer(texts).to(device)).float()
        features = F.normalize(features, dim=-1)
        features = features.view(len(COLOURS), len(templates), -1)
        return F.normalize(features.mean(1), dim=-1)

    @torch.no_grad()
    def name_colours(image, found, name):
        if name not in heads:
            heads[name] = colour_head(name)
        crops = [transform(cut_out(image, box, mask)) for box, _, mask in found]
        features = model.encode_image(torch.stack(crops).to(device)).float()
        features = F.normalize(features, dim=-1)
        best = (features @ heads[name].T).argmax(1)
        return [COLOURS[i] for i in best.tolist()]
    return name_colours


def cut_out(image, box, mask):
    """The object alone on grey, cropped to its box."""
    grey = Image.new('RGB', image.size, GREY)
    alone = Image.composite(image, grey, Image.fromarray(mask))
    return alone.crop([int(edge) for edge in box])
