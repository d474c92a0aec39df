"""pi_phi, the encoder: a vision-language model that sees an image and captions it.

    x --see--> vision --sample--> y ~ pi_phi(y | x)         log pi_phi(y_t | x, y_<t): logp
    y --text_states--> h_T, the last-layer states that the projector turns into a condition

The sampler and the log-prob of given captions stand side by side, and both come down to
`pick_logp`: a rollout and the update that learns from it have to agree. Shapes: see model.py.
"""
import inspect
import math
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from lib.next_token import CaptionCache, captured, next_state
from lib.ranks import by_rows, group_slices, take

CAPTIONS_AT_ONCE = 256      # in whole groups; at 3B and 800 tokens their cache is 8 GB
LOGITS_AT_ONCE = 2 ** 23    # 55 rows of a vocabulary of 152k


# --- a token -------------------------------------------------------------------------------------
def choose(logits, u):
    """Samples tokens (B,) from logits (B, V) by the inverse of the cumulated distribution.

    u (B, 1) uniforms in [0, 1): the first token whose cumulated probability exceeds u.
    """
    probs = logits.softmax(-1)
    if probs.device.type != 'mps':              # which has no float64
        probs = probs.double()
    cumulated = probs.cumsum(-1)
    u = u.to(probs.dtype) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, u, right=True)[:, 0]


def pick_logp(logits, y, temperature=1.0, forbidden=None):
    """log pi(y) of tokens y (n,) under logits (n, V), which may be overwritten.

    Returns (n,) float32, -inf at a forbidden token. forbidden (V,) bool leaves the normaliser.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if forbidden is not None:
        logits = logits.masked_fill_(forbidden, -math.inf)
    return -F.cross_entropy(logits, y, reduction='none')


def token_logp(states, head, y, temperature=1.0, forbidden=None, chunk=LOGITS_AT_ONCE):
    """log pi(y_t | ...) of given tokens, from the states that predict them.

    states (B, T, d), y (B, T), head: d -> V. Returns (B, T) float32. Never holds more than `chunk`
    logits: with a vocabulary of 152k the rows go in pieces, recomputed in the backward pass.
    """
    def rows_logp(states, y):
        return pick_logp(head(states), y, temperature, forbidden)

    B, T = y.shape
    states = states.flatten(0, 1)
    y = y.flatten()
    rows = max(1, chunk // head.weight.shape[0])
    if len(y) <= rows:
        return rows_logp(states, y).view(B, T)
    pieces = zip(states.split(rows), y.split(rows))
    parts = [checkpoint(rows_logp, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(parts).view(B, T)


# --- the encoder ---------------------------------------------------------------------------------
class Encoder(nn.Module):
    """Qwen2.5-VL as captioner and as encoder of captions.

    vlm: the library's model, processor: its tokenizer, chat template and image processor.
    text_encoder: the frozen language model that re-encodes captions, None where the captioner does
    it itself. Another family of models overrides what is Qwen's here and has an entry in ENCODERS:
    docs/exchange.md.
    """
    # every linear layer of the language model, never the vision tower, lm_head or projector
    lora_targets = r'.*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj'
    # the name of a parameter as transformers 5 has it -> as the hub has it
    hub_names = {'model.language_model.': 'model.', 'model.visual.': 'visual.'}

    def __init__(self, config, vlm, processor):
        super().__init__()
        self.config = config
        self.vlm = vlm
        self.text_encoder = None
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.end = self.tokenizer.eos_token_id
        self.image_token = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        # transformers 5.24 renamed past_key_values to cache
        known = inspect.signature(self.language_model.forward).parameters
        self.cache_name = 'cache' if 'cache' in known else 'past_key_values'
        # a sampled image token would make re-scoring fail hours into a run, and ids past the
        # tokenizer mean nothing
        forbidden = torch.arange(self.head.weight.shape[0]) >= len(self.tokenizer)
        special = [token for token in self.tokenizer.all_special_ids if token != self.end]
        forbidden[[*special, self.image_token]] = True
        self.register_buffer('forbidden', forbidden, persistent=False)
        self.read_templates()

    @property
    def language_model(self):
        return self.vlm.model.language_model

    @property
    def head(self):
        return self.vlm.lm_head

    @property
    def embed(self):
        return self.vlm.get_input_embeddings()

    @property
    def device(self):
        return self.forbidden.device

    @property
    def width(self):
        """d, of the last-layer states."""
        return self.head.weight.shape[1]

    def autocast(self):
        """Matrix work in config.dtype over float32 master weights; nothing to do in float32."""
        if self.config.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.dtype))

    def check_resolution(self, resolution):
        """What is wrong with images of that side, '' if nothing."""
        vision = self.vlm.config.vision_config
        least = 2 * vision.patch_size * vision.spatial_merge_size
        if resolution < least:
            return f'expected at least {least}, for the patches of the encoder'
        return ''

    # --- templates and texts ---------------------------------------------------------------------
    def read_templates(self):
        """Token ids around a caption prompt's image, and around a text that is to be drawn."""
        self.before_image, self.after_image = self.around_image(self.config.caption_prompt)
        text = dict(role='generate', content=[dict(type='text', text='\0')])
        self.before_text, self.after_text = self.ids_around(text, '\0')

    def around_image(self, prompt, answer=True):
        """Token ids before and after the image of a user turn: the prompt, then the image.

        answer: whether the assistant's turn is opened behind it.
        """
        content = [dict(type='image')]
        if prompt:
            content.insert(0, dict(type='text', text=prompt))
        mark = self.processor.image_token
        if mark in prompt:
            raise SystemExit(f'{prompt!r}: expected a prompt without the image mark {mark}')
        return self.ids_around(dict(role='user', content=content), mark, answer)

    def ids_around(self, message, mark, answer=True):
        """Token ids before and after `mark` in a message under the chat template."""
        text = self.processor.apply_chat_template([message], tokenize=False,
                                                  add_generation_prompt=answer)
        before, after = text.split(mark)
        return [self.tokenizer(part, add_special_tokens=False).input_ids
                for part in (before, after)]

    @property
    def text_room(self):
        """How many tokens of a text fit a condition; no bound where cond_len is 0."""
        if not self.config.cond_len:
            return self.config.caption_len - 1
        return self.config.cond_len - len(self.before_text) - len(self.after_text)

    def tokens(self, texts, T=None):
        """Strings -> y, mask (B, T) as the sampler returns them, and what was lost on the way.

        T: if not given, what a condition has room for, and the end token. lost: dict of cut, the
        texts that do not fit, and unknown, the tokens that the tokenizer does not know. A control
        token cannot arise from a text.
        """
        T = T or self.text_room + 1
        y = torch.full((len(texts), T), self.end)
        mask = torch.zeros(len(texts), T)
        lost = dict(cut=0, unknown=0)
        unknown = self.tokenizer.unk_token_id               # None where all can be spelt
        control = set(self.tokenizer.all_special_ids) - {unknown}
        for i, text in enumerate(texts):
            text = text.encode('utf-8', 'replace').decode()         # a lone surrogate
            token_ids = self.tokenizer(text, add_special_tokens=False,
                                       split_special_tokens=True).input_ids
            # a vocabulary of whole words holds the control tokens' names too
            token_ids = [unknown if token in control else token for token in token_ids]
            lost['unknown'] += token_ids.count(unknown)
            token_ids = [token for token in token_ids if token is not None]
            lost['cut'] += len(token_ids) >= T
            row = (token_ids + [self.end])[:T]
            y[i, :len(row)] = torch.tensor(row)
            mask[i, :len(row)] = 1
        return y.to(self.device), mask.to(self.device), lost

    def words(self, y, mask):
        """(B, T) bool: the caption's own tokens, without the end token and what follows it."""
        return mask.bool() & (y != self.end)

    def texts(self, y, mask):
        """Tokens -> strings, up to the end token."""
        kept = self.words(y, mask).cpu()
        return [self.tokenizer.decode(row[keep], skip_special_tokens=True)
                for row, keep in zip(y.cpu(), kept)]

    # --- image -> caption ------------------------------------------------------------------------
    @torch.no_grad()
    def see(self, x):
        """x (P, 3, R, R) in [-1, 1] -> vision, what the frozen vision tower makes of it.

        A dict of features (P, N, d) and grid (P, 3), P rows each.
        """
        features, grids = [], []
        for part in x.split(self.config.micro_batch or len(x)):
            pixels = ((part + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
            patches = self.processor.image_processor(images=list(pixels), return_tensors='pt')
            grid = patches['image_grid_thw'].to(self.device)
            pixel_values = patches['pixel_values'].to(self.device)
            with self.autocast():
                features += self.vlm.model.get_image_features(pixel_values, grid).pooler_output
            grids.append(grid)
        return dict(features=torch.stack(features), grid=torch.cat(grids))

    def positions(self, token_ids, vision):
        """Positions (3, P, L) of tokens (P, L): time, row and column, by the library's own rule."""
        # the token types say where the image's rows and columns go; without them the image would
        # silently get the positions of text
        types = (token_ids == self.image_token).int()
        positions, _ = self.vlm.model.get_rope_index(token_ids, mm_token_type_ids=types,
                                                     image_grid_thw=vision['grid'])
        return positions

    def positions_after(self, start, B, T):
        """Positions (3, B, T) of T text tokens, the first at `start`."""
        return (start + torch.arange(T, device=self.device)).expand(3, B, T)

    def caption_cache(self, prompt, G, room):
        """The library's cache of P prompts -> one of G captions each, for `next_state`."""
        return CaptionCache(prompt, G, room, fixed=self.device.type == 'cuda')

    def next_state(self, token, position, cache):
        """The last-layer state (B, 1, d) of one more token (B, 1) of each caption."""
        return next_state(self.language_model, self.embed(token), position, cache)

    def run(self, embedded, positions, cache=None):
        """Last-layer states (n, L, d) of embedded tokens (n, L, d) behind those in `cache`.

        The library's cache grows by them. None: there is nothing before, and nothing is kept.
        """
        options = dict(position_ids=positions, use_cache=cache is not None)
        if cache is not None:
            options[self.cache_name] = cache
        return self.language_model(inputs_embeds=embedded, **options).last_hidden_state

    def prompt(self, vision):
        """Embedded caption prompt of P images of one size (P, L, d), and its positions."""
        features = vision['features']
        P, N = features.shape[:2]
        token_ids = self.before_image + [self.image_token] * N + self.after_image
        token_ids = torch.tensor(token_ids, device=self.device).expand(P, -1)
        embedded = self.embed(token_ids)
        start = len(self.before_image)
        before, after = embedded[:, :start], embedded[:, start + N:]
        embedded = torch.cat([before, features.to(embedded.dtype), after], 1)
        return embedded, self.positions(token_ids, vision)

    def prefill(self, vision):
        """Runs the prompt once per image.

        Returns its cache, the last state (P, 1, d), and the position of the next token.
        """
        embedded, positions = self.prompt(vision)
        cache = DynamicCache(config=self.language_model.config)
        states = self.run(embedded, positions, cache)
        return cache, states[:, -1:], positions.max().item() + 1

    @torch.no_grad()
    def sample(self, vision, G=1, temperature=1.0, uniforms=None):
        """G captions per image by cached decoding, P * G rows with a group's captions together.

        uniforms (B, T) in [0, 1): the randomness behind each token. temperature 0 is greedy and
        needs none. Returns y (B, T), the end token and then padding with it; mask (B, T) float;
        logp (B, T), recorded while sampling.
        """
        parts = []
        for images, rows, _ in group_slices(len(vision['features']), G, CAPTIONS_AT_ONCE):
            own = uniforms[rows] if uniforms is not None else None
            parts.append(self.sample_together(take(vision, images), G, temperature, own))
        y, mask, logp = zip(*parts)
        return torch.cat(y), torch.cat(mask), torch.cat(logp)

    def sample_together(self, vision, G, temperature, uniforms):
        """`sample` of captions that are written at the same time."""
        T = self.config.caption_len
        B = len(vision['features']) * G
        y = torch.full((B, T), self.end, device=self.device)
        mask = torch.zeros(B, T, device=self.device)
        logp = torch.zeros(B, T, device=self.device)
        alive = torch.ones(B, dtype=torch.bool, device=self.device)
        t = torch.zeros(1, dtype=torch.long, device=self.device)    # the token that comes next

        def write():
            """Chooses token t of every caption from `states`."""
            logits = self.head(states[:, -1]).float()
            logits = logits.masked_fill_(self.forbidden, -math.inf)
            if temperature == 0:
                token = logits.argmax(-1)
                chosen = pick_logp(logits, token)
            else:
                token = choose(logits / temperature, uniforms.index_select(1, t))
                chosen = pick_logp(logits, token, temperature)
            logp.index_copy_(1, t, (chosen * alive)[:, None])
            mask.index_copy_(1, t, alive.float()[:, None])
            y.index_copy_(1, t, torch.where(alive, token, self.end)[:, None])
            alive.logical_and_(token != self.end)

        def go_on():
            """Reads token t and chooses the next one; in place, so that it can be captured."""
            states.copy_(self.next_state(y.index_select(1, t), start + t, cache))
            t.add_(1)
            write()

        with self.autocast():
            cache, states, start = self.prefill(vision)
            cache = self.caption_cache(cache, G, T)
            states = states.repeat_interleave(G, 0)                 # (B, 1, d)
            write()
            for count in range(1, T):
                if not alive.any():
                    break
                if count == 3 and getattr(cache, 'fixed', False):   # two tokens have warmed it up
                    go_on = captured(go_on)
                go_on()
        return y, mask, logp

    def logp(self, vision, y, temperature=1.0):
        """log pi_phi(y_t | x, y_<t): (B, T) float32, differentiable.

        G = B / P captions per image in contiguous blocks. Entries past the end token are finite
        but mean nothing: weigh them with the sampler's mask.
        """
        with self.autocast():
            states = self.caption_states(vision, y)[:, :-1]
            return token_logp(states, self.head, y, temperature, self.forbidden)

    def forward(self, *args, **options):
        """`logp`: what DistributedDataParallel calls, also where a subclass has its own."""
        return self.logp(*args, **options)

    def caption_states(self, vision, y):
        """States (B, T + 1, d) of the prompt's last token and of each caption token.

        State t has read y[:, :t] and predicts y[:, t].
        """
        B, T = y.shape
        G = B // len(vision['features'])
        if self.config.checkpointing:    # recomputation forbids the cache: one prompt per caption
            embedded, positions = self.prompt(vision)
            embedded = embedded.repeat_interleave(G, 0)
            return self.states_after(embedded, positions.repeat_interleave(G, -2), y)
        cache, states, start = self.prefill(vision)
        cache.batch_repeat_interleave(G)
        others = self.run(self.embed(y), self.positions_after(start, B, T), cache)
        return torch.cat([states.repeat_interleave(G, 0), others], 1)

    def states_after(self, embedded, positions, y):
        """`caption_states` from an embedded prompt (B, L, d) per caption, in one pass."""
        B, T = y.shape
        ahead = self.positions_after(positions.max() + 1, B, T)
        states = self.run(torch.cat([embedded, self.embed(y)], 1),
                          torch.cat([positions, ahead], -1))
        return states[:, -T - 1:]

    # --- states that become a condition ----------------------------------------------------------
    def text_states(self, y, mask, width=0):
        """h_T: the caption re-encoded alone, the image unseen, a true bottleneck.

        Captions y, mask (B, T) -> (B, cond_len, d). Padded on the right to cond_len, or to
        `width`, so that a caption's states are the same alone and in any batch; what does not fit
        is cut. The decoder has no mask: it attends to the states of the padding too.
        """
        token_ids, attend = self.text_ids(y, mask, width)
        with self.autocast():
            return by_rows(self.read, self.config.micro_batch, token_ids, attend)

    def image_as_text(self, vision):
        """h_v: an image in a caption's place; all else, template and padding, is as for a text.

        vision: of P images, of N tokens each -> (P, cond_len, d).
        """
        features = vision['features']
        y = torch.full(features.shape[:2], self.image_token, device=self.device)
        token_ids, attend = self.text_ids(y, torch.ones_like(y))
        with self.autocast():
            return by_rows(self.read, self.config.micro_batch, token_ids, attend, features)

    def read(self, token_ids, attend, features=None):
        """Last-layer states of a text; features (n, N, d) take the place of its image tokens."""
        language_model = self.text_encoder or self.language_model
        embedded = language_model.get_input_embeddings()(token_ids)
        if features is not None:
            at_image = (token_ids == self.image_token)[..., None]
            embedded = embedded.masked_scatter(at_image, features.to(embedded.dtype))
        return language_model(inputs_embeds=embedded, attention_mask=attend,
                              use_cache=False).last_hidden_state

    def text_ids(self, y, mask, width=0):
        """Captions in the template of a text to be drawn: ids and attention (B, cond_len)."""
        words = self.words(y, mask)
        start = len(self.before_text)
        around = start + len(self.after_text)
        width = width or self.config.cond_len
        if not width:       # cond_len 0, as the release: the longest row or the negative prompt
            longest = words.sum(1).max().item()
            width = around + max(longest, self.negative_length)
        room = width - around
        words = words[:, :room]
        end = start + words.sum(1, keepdim=True)                # (B, 1)
        token_ids = torch.full((len(y), width), self.tokenizer.pad_token_id, device=self.device)
        token_ids[:, :start] = torch.tensor(self.before_text, device=self.device)
        caption = torch.where(words, y[:, :room], self.tokenizer.pad_token_id)
        token_ids[:, start:start + words.shape[1]] = caption
        for place, token in enumerate(self.after_text):
            token_ids.scatter_(1, end + place, token)
        places = torch.arange(width, device=self.device)
        attend = (places < end + len(self.after_text)).long()
        return token_ids, attend

    @property
    def negative_length(self):
        """Tokens of the negative prompt, as many as are kept of it."""
        _, mask, _ = self.tokens([self.config.negative_prompt])
        return int(mask.sum()) - 1

    def image_states(self, vision):
        """States at the image's positions of the caption prompt: (P, N, d)."""
        embedded, positions = self.prompt(vision)
        start = len(self.before_image)
        N = vision['features'].shape[1]
        with self.autocast():
            states = self.run(embedded, positions)
        return states[:, start:start + N]


# model_type of a config.json -> what drives such a model
ENCODERS = dict(qwen2_5_vl=Encoder)
