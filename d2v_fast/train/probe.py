"""How much do frozen features know? Logistic regression on them, next to an untrained model and to plain features.

Three rows are measured on the same examples: the pretrained model, the same architecture with fresh weights, and
features without any network (log-mel statistics, raw pixels, counts of bytes and byte pairs). Only what the first has
over the other two is a gain of pretraining.

Dims: M examples, B batch, T positions, C channels, S samples, D features.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from d2v_fast.nn import Data2Vec
from d2v_fast.train.data.base import DataError, UnreadableFile
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.probe_readers import Features, Reader, image_reader, speech_reader, text_reader

logger = logging.getLogger(__name__)

CHUNK = 256  # examples decoded at a time; sorted by length inside a chunk, so that batches hold little padding


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How to probe. ``normalize``, ``mean`` and ``std`` must be those of pretraining; None: its defaults."""

    layer: int | Literal["average"] = "average"  # 0 = encoder input, i = output of block i; average: of all blocks
    batch_size: int = 16  # clips of speech share a batch only with others of their length
    max_seconds: float = 10.0  # of a clip, from its middle
    max_examples: int | None = None  # of each part, spread evenly over each class; None = all
    normalize: bool = True  # speech: zero mean and unit variance per clip
    mean: tuple[float, ...] | None = None  # images
    std: tuple[float, ...] | None = None
    seed: int = 0  # of the cross-validation folds

    def __post_init__(self) -> None:
        if self.layer != "average" and (not isinstance(self.layer, int) or self.layer < 0):
            raise ValueError(f"layer must be 'average' or an int >= 0, got {self.layer!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {self.max_seconds}")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1 or None, got {self.max_examples}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """Accuracies, in 0..1, of one kind of features."""

    name: str
    features: int  # D
    train_accuracy: float
    test_accuracy: float
    test_stderr: float  # binomial standard error of test_accuracy
    regularisation: float  # C chosen by cross-validation on the training part


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """The table of a probe. ``rows`` are named ``pretrained``, ``untrained`` and after the plain features."""

    modality: str
    classes: tuple[str, ...]
    num_train: int
    num_test: int
    chance: float  # test accuracy of always answering the commonest training label
    layer: int | str
    rows: tuple[ProbeRow, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # (file or line, reason)

    def row(self, name: str) -> ProbeRow:
        """The row of that name; KeyError when there is none."""
        found = {row.name: row for row in self.rows}
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ProbeResult":
        """Inverse of :meth:`to_dict`, also after a round trip through JSON."""
        values = {field.name: data[field.name] for field in fields(cls)}
        values["classes"] = tuple(values["classes"])
        values["rows"] = tuple(ProbeRow(**row) for row in values["rows"])
        values["skipped"] = tuple(tuple(entry) for entry in values["skipped"])
        return cls(**values)

    def table(self) -> str:
        """The result as lines of text."""
        lines = [
            f"{self.modality} probe: {self.num_train} train, {self.num_test} test, {len(self.classes)} classes, "
            f"layer {self.layer}",
            f"{'features':<22}{'dim':>7}{'train %':>9}{'test %':>9}{'+-':>6}",
            f"{'chance':<22}{'':>16}{100 * self.chance:>9.1f}",
        ]
        for row in self.rows:
            accuracies = f"{100 * row.train_accuracy:>9.1f}{100 * row.test_accuracy:>9.1f}{100 * row.test_stderr:>6.1f}"
            lines.append(f"{row.name:<22}{row.features:>7}{accuracies}")
        if self.skipped:
            name, reason = self.skipped[0]
            lines.append(f"skipped {len(self.skipped)} unreadable files, e.g. {name}: {reason}")
        return "\n".join(lines)


def probe(
    model: Data2Vec,
    untrained: Data2Vec,  # same configuration, fresh weights
    train: str | Path,
    test: str | Path,
    config: ProbeConfig | None = None,
    *,
    tokenizer: str | Path | None = None,
) -> ProbeResult:
    """Fit on the labelled data at ``train``, report accuracies on ``test``; the models are not changed.

    Speech and images: a folder with one sub-folder of files per class. Text: a UTF-8 file of ``label<TAB>text``
    lines, and ``tokenizer``, the ``tokenizer.json`` saved beside the checkpoint. Models run where their parameters
    are. Files that cannot be read are skipped and listed in the result.

    Raises:
        DataError: nothing at a path, a single class, a class without a readable example, test classes that ``train``
            lacks, or a ``tokenizer`` that does not fit the model.
        ValueError: ``config.layer`` is not a layer of the model, or a text model comes without ``tokenizer``.
    """
    config = config or ProbeConfig()
    layers = model.config.encoder.layers
    if config.layer != "average" and config.layer > layers:
        raise ValueError(f"layer must be 'average' or in 0..{layers}, got {config.layer}")
    reader = _reader(model, config, tokenizer)
    models = {"pretrained": model, "untrained": untrained}
    x_train, y_train, skipped = _extract(reader, models, Path(train), config)
    x_test, y_test, also_skipped = _extract(reader, models, Path(test), config)
    classes = sorted(set(y_train.tolist()))
    if len(classes) < 2:
        raise DataError(f"{train}: a probe needs at least two classes, found only {classes[0]!r}")
    if unknown := sorted(set(y_test.tolist()) - set(classes)):
        raise DataError(f"{test}: classes that {train} lacks: {', '.join(unknown)}")
    commonest = min(Counter(y_train.tolist()).items(), key=lambda item: (-item[1], item[0]))[0]
    return ProbeResult(
        modality=model.config.modality,
        classes=tuple(classes),
        num_train=len(y_train),
        num_test=len(y_test),
        chance=float(np.mean(y_test == commonest)),
        layer=config.layer,
        rows=tuple(fit_row(name, x_train[name], y_train, x_test[name], y_test, config.seed) for name in x_train),
        skipped=(*skipped, *also_skipped),
    )


def probe_checkpoint(
    checkpoint: str | Path,
    train: str | Path,
    test: str | Path,
    *,
    layer: str | int = "average",
    max_seconds: float = 10.0,
    max_examples: int | None = None,
    seed: int = 0,
) -> ProbeResult:
    """:func:`probe` of a run's checkpoint, on a GPU if there is one; ``seed`` makes the untrained model.

    How speech and images are normalised comes from the checkpoint, a text model's tokenizer from ``tokenizer.json``
    beside it.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: ``layer`` is neither "average" nor the number of a layer.
        DataError: see :func:`probe`.
    """
    from d2v_fast.train.checkpoint import read
    from d2v_fast.train.config import model_config

    content = read(checkpoint)
    model = Data2Vec(model_config(content["config"]["model"]))
    model.load_state_dict(content["model"])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    layers = model.config.encoder.layers
    if layer != "average":
        if str(layer) not in map(str, range(layers + 1)):
            raise ConfigError(f"layer must be 'average' or in 0..{layers}, got {layer!r}")
        layer = int(layer)
    data = content["config"]["data"]
    mean, std = (tuple(data[name]) if data.get(name) else None for name in ("mean", "std"))
    tokenizer = Path(checkpoint).parent / "tokenizer.json"
    config = ProbeConfig(
        layer=layer,
        max_seconds=max_seconds,
        max_examples=max_examples,
        normalize=data.get("normalize", True),
        mean=mean,
        std=std,
        seed=seed,
    )
    return probe(model, untrained_like(model, seed), train, test, config, tokenizer=tokenizer)


def untrained_like(model: Data2Vec, seed: int = 0) -> Data2Vec:
    """A model of the same configuration on the same device with fresh weights; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Data2Vec(model.config)
    return fresh.to(next(model.parameters()).device)


def fit_row(
    name: str,
    x_train: Features,  # [M, D]
    y_train: np.ndarray,  # [M] labels
    x_test: Features,
    y_test: np.ndarray,
    seed: int = 0,
) -> ProbeRow:
    """Logistic regression on one kind of features, its strength by cross-validation on the training part."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Centring would make sparse counts dense.
    scaler = StandardScaler(with_mean=not sparse.issparse(x_train))
    classifier = make_pipeline(scaler, LogisticRegression(max_iter=1000, random_state=seed))
    folds = min(3, *Counter(y_train).values())
    if folds > 1:
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
        strengths = {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}
        classifier = GridSearchCV(classifier, strengths, cv=splits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(x_train, y_train)
    if caught:
        logger.warning("%s: logistic regression stopped at its iteration limit in %d fits", name, len(caught))
    accuracy = float(classifier.score(x_test, y_test))
    best = classifier.best_estimator_ if folds > 1 else classifier
    return ProbeRow(
        name=name,
        features=x_train.shape[1],
        train_accuracy=float(classifier.score(x_train, y_train)),
        test_accuracy=accuracy,
        test_stderr=float(np.sqrt(accuracy * (1 - accuracy) / len(y_test))),
        regularisation=float(best[-1].C),
    )


def _reader(model: Data2Vec, config: ProbeConfig, tokenizer: str | Path | None) -> Reader:
    frontend = model.config.frontend
    if model.config.modality == "speech":
        return speech_reader(frontend, config.max_seconds, config.batch_size, config.normalize)
    if model.config.modality == "image":
        return image_reader(frontend, config.mean, config.std, config.batch_size)
    if tokenizer is None:
        raise ValueError("tokenizer must be the path of the model's tokenizer.json for a text model, got None")
    return text_reader(frontend, tokenizer, config.batch_size)


def _batches(decoded: list[tuple[Any, str]], reader: Reader) -> Iterator[list[tuple[Any, str]]]:
    """``decoded``, sorted by length, in batches."""
    runs = groupby(decoded, key=lambda pair: len(pair[0]) if reader.equal_lengths else 0)
    for _, run in runs:
        yield from _chunks(run, reader.batch_size)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _spread(examples: list[tuple[Any, str]], limit: int | None) -> list[tuple[Any, str]]:
    """About ``limit`` examples, evenly out of each class in proportion to its size; at least one of each."""
    if limit is None or len(examples) <= limit:
        return examples
    classes: dict[str, list[tuple[Any, str]]] = {}
    for example in examples:
        classes.setdefault(example[1], []).append(example)
    kept = []
    for group in classes.values():
        count = max(1, limit * len(group) // len(examples))
        kept += [group[i * len(group) // count] for i in range(count)]
    return kept


def _extract(
    reader: Reader, models: dict[str, Data2Vec], path: Path, config: ProbeConfig
) -> tuple[dict[str, Features], np.ndarray, list[tuple[str, str]]]:
    """Features by row name, labels [M], and what was skipped."""
    examples = _spread(reader.examples(path), config.max_examples)
    features: dict[str, list[Features]] = {name: [] for name in (*models, reader.plain_name)}
    labels: list[str] = []
    skipped: list[tuple[str, str]] = []
    for chunk in _chunks(examples, CHUNK):
        decoded = []
        for item, label in chunk:
            try:
                decoded.append((reader.read(item), label))
            except UnreadableFile as error:
                skipped.append((str(item), error.reason))
        decoded.sort(key=lambda pair: len(pair[0]))
        for batch in _batches(decoded, reader):
            raw = [example for example, _ in batch]
            inputs, padding_mask = reader.collate(raw)
            for name, model in models.items():
                features[name].append(pooled(model, inputs, padding_mask, config.layer))
            features[reader.plain_name].append(reader.plain(raw))
            labels += [label for _, label in batch]
    if empty := sorted({label for _, label in examples} - set(labels)):
        reasons = f"; the last one: {skipped[-1][0]}: {skipped[-1][1]}" if skipped else ""
        raise DataError(f"{path}: no readable example of class {', '.join(map(repr, empty))}{reasons}")
    if skipped:
        logger.warning("%s: skipped %d of %d examples, e.g. %s: %s", path, len(skipped), len(examples), *skipped[0])
    stack = {name: sparse.vstack if sparse.issparse(parts[0]) else np.concatenate for name, parts in features.items()}
    return {name: stack[name](parts) for name, parts in features.items()}, np.array(labels), skipped


@torch.no_grad()
def pooled(
    model: Data2Vec,
    inputs: Tensor,  # as Data2Vec.hidden_states takes them
    padding_mask: Tensor | None,  # [B, T] bool, True = padding
    layer: int | Literal["average"] = "average",
) -> np.ndarray:
    """Features [B, C] fp32: a layer's output (or the mean of all blocks' outputs), averaged over the valid positions.

    Images: over the patches, without the class token. The model's training flag is left as it was.
    """
    device = next(model.parameters()).device
    padding_mask = None if padding_mask is None else padding_mask.to(device)
    training = model.training
    model.eval()
    try:
        states = model.hidden_states(inputs.to(device), padding_mask)
    finally:
        model.train(training)
    x = states[layer] if layer != "average" else torch.stack(states[1:]).mean(dim=0)  # [B, P, C]
    x = x.float()
    if model.config.modality == "image":
        x = x[:, 1:]
    if padding_mask is None:
        return x.mean(dim=1).cpu().numpy()
    valid = (~padding_mask).unsqueeze(2)  # [B, T, 1]
    return ((x * valid).sum(dim=1) / valid.sum(dim=1)).cpu().numpy()
