"""Runs on a little text with a tiny model: the data, and the settings that whole runs share."""

from pathlib import Path

WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "rain", "snow", "wind"]


def write_text(folder: Path, lines: int = 240) -> Path:
    """``folder``, made here, with documents of eleven words."""
    folder.mkdir()
    documents = [" ".join(WORDS[(i * k + k) % 12] for k in range(1, 12)) for i in range(lines)]
    (folder / "a.txt").write_text("\n".join(documents), encoding="utf-8")
    return folder


def overrides(text: Path, out: Path, *more: str) -> list[str]:
    """Of text_demo: two heads, three layers, dropout and LayerDrop, batches of 8 x 16. The last one of a key counts."""
    return [
        f"data.path={text}",
        f"out={out}",
        "model.frontend.vocab_size=270",
        "model.frontend.max_positions=16",
        "model.frontend.dropout=0.1",
        "model.encoder.dim=32",
        "model.encoder.ffn_dim=48",
        "model.encoder.heads=2",
        "model.encoder.layers=3",
        "model.encoder.dropout=0.1",
        "model.encoder.layerdrop=0.2",
        "model.targets.top_k=2",
        "data.batch_size=8",
        "data.tokens_per_sample=16",
        "workers=0",
        "device=cpu",
        *more,
    ]
