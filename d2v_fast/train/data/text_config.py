"""Where text is and how it is cut, for text as it is and for text that fairseq has binarised."""

from dataclasses import dataclass
from typing import Literal

from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data.base import require
from d2v_fast.train.data.formats import LocationConfig

BOS, PAD, EOS = 0, 1, 2  # RoBERTa's and fairseq's


@dataclass(frozen=True, kw_only=True)
class TextDataConfig(LocationConfig):
    """Where the text is and how it is cut; the defaults give the released recipe's 8192 tokens a batch."""

    # UTF-8, one document a line: a .txt file or a folder of them; parquet or arrow tables, one document a row; or
    # folders of fairseq-preprocess, several with colons between them
    path: str
    batch_size: int = 16  # blocks of tokens_per_sample; shorter ones are packed into as many tokens
    tokens_per_sample: int = 512  # with <s>
    # where blocks end, for fairseq's folders (see binarized.cut); the released recipe has complete_doc
    break_mode: Literal["none", "complete", "complete_doc", "eos"] = "none"
    tokenizer: str | None = None  # a tokenizer.json; None: train one on the text

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, "data.batch_size", "at least 1", self.batch_size)
        require(self.tokens_per_sample >= 2, "data.tokens_per_sample", "at least 2", self.tokens_per_sample)
        modes = ("none", "complete", "complete_doc", "eos")
        require(self.break_mode in modes, "data.break_mode", f"one of {', '.join(modes)}", self.break_mode)


def check_text_model(config: TextDataConfig, model: Data2VecConfig) -> None:
    """Raise the ConfigError of a model for another modality, or with too few positions."""
    require(model.modality == "text", "model.modality", "'text' for text data", model.modality)
    positions = model.frontend.max_positions
    require(
        config.tokens_per_sample <= positions,
        "data.tokens_per_sample",
        f"at most the model's max_positions ({positions})",
        config.tokens_per_sample,
    )
