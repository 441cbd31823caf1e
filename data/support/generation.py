"""Which prompts are continued together, and what is noted of it, around transformers' generate."""

from transformers import LogitsProcessor

from .models import rope_borders


def generation_batches(model, prompts, room, batch_size):
    """Index lists of prompts of equal room and like length (all wait while the longest is read).

    Of equal length where the generation_config looks back, which would take the padding for text,
    and where one may cross a border of its rotary tables, which a shorter one would reach later.
    """
    looks_back = any(getattr(model.generation_config, name, None) not in (None, 0, 1)
                     for name in ("repetition_penalty", "no_repeat_ngram_size", "min_length",
                                  "bad_words_ids", "sequence_bias"))
    borders, batches = rope_borders(model), []
    for i in sorted(range(len(prompts)), key=lambda i: (room[i], len(prompts[i]))):
        first = batches[-1][0] if batches else i
        length = len(prompts[i])
        alike = looks_back or any(length + room[i] > border for border in borders)
        apart = room[i] != room[first] or length - len(prompts[first]) > (0 if alike else 32)
        if room[i] > 0 and (not batches or apart or len(batches[-1]) == batch_size):
            batches.append([])
        if room[i] > 0:
            batches[-1].append(i)
    return batches[::-1]  # the longest first, so that memory runs out at once or never


def decode(tokenizer, sequences, **options):
    return [None if ids is None else tokenizer.decode(ids, skip_special_tokens=True, **options)
            for ids in sequences]


class Finite(LogitsProcessor):
    """Changes nothing; notes for each step in which rows all logits were numbers."""

    def __init__(self):
        self.finite = []

    def __call__(self, input_ids, scores):
        self.finite.append(scores.amax(-1).isfinite())
        return scores
