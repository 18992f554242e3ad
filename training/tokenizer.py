"""The bundled model's tokenizer: byte-level BPE over its own texts, with DeepSeek's special tokens.

Ids: BOS, EOS, pad; the 256 bytes; merges; DeepSeek's other tokens at the end. Digits stand alone, as in numbers that
are to be added up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.model.publish import LEADING_TOKENS, TRAILING_TOKENS


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """tokenizer.json of `vocab_size` tokens at most; fewer where the texts have no more to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(TRAILING_TOKENS),
            special_tokens=list(LEADING_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    made = json.loads(tokenizer.to_str())
    first = len(made["model"]["vocab"])
    made["added_tokens"] += [
        {
            "id": first + n,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,  # as in DeepSeek's own: <think> and the like are visible text
        }
        for n, content in enumerate(TRAILING_TOKENS)
    ]
    return json.dumps(made, ensure_ascii=False)
