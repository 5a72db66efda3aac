"""Byte-level BPE with the special tokens that the model expects: train one, or check one that was given."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from d2v_fast.train.errors import DataError

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in RoBERTa
MASK_TOKEN = "<mask>"  # the last id


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019) of exactly ``vocab_size`` tokens, special ones included.

    Raises:
        DataError: the text has too few distinct words for so many tokens; says how many it gives.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, _, eos, _ = SPECIAL_TOKENS
    tokenizer.post_processor = processors.RobertaProcessing((eos, 2), (bos, 0), add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens([MASK_TOKEN])
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        bound = "is too small for" if reached < vocab_size else "needs more tokens than"
        raise DataError(
            f"the text {bound} a vocabulary of {vocab_size} tokens, it gives {reached}; "
            f"set the model's vocab_size to {reached} or change the text"
        )
    return as_encoder(tokenizer)


def load_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    """Load a ``tokenizer.json`` of the ``tokenizers`` library and check it against the model.

    Raises:
        DataError: missing, broken, or with another vocabulary size or other ids for the special tokens.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist; expected a tokenizer.json file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer {path} cannot be read: {error}") from error
    expected = {token: i for i, token in enumerate(SPECIAL_TOKENS)} | {MASK_TOKEN: vocab_size - 1}
    found = {token: tokenizer.token_to_id(token) for token in expected}
    if found != expected or tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"tokenizer {path} does not fit the model: expected {vocab_size} tokens with ids {expected}, "
            f"got {tokenizer.get_vocab_size()} tokens with ids {found}"
        )
    return as_encoder(tokenizer)


def as_encoder(tokenizer: Tokenizer) -> Tokenizer:
    """Plain text to ids and nothing else: special tokens spelled out in a text are text, nothing is cut or padded."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
