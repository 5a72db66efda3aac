"""The probe: readers, pooling over valid positions, and that it finds what is in the features and nothing more."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from d2v_fast.nn import Data2Vec, Data2VecConfig
from d2v_fast.nn.masking import BlockMask
from d2v_fast.train import checkpoint
from d2v_fast.train.data.base import DataError
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.probe import ProbeConfig, ProbeResult, _spread, pooled, probe, probe_checkpoint, untrained_like
from d2v_fast.train.probe_readers import image_reader, log_mel_statistics, speech_reader, text_reader

SMALL = {"layers": 2, "dim": 32, "ffn_dim": 48, "heads": 2}


def make_model(modality: str, seed: int = 0) -> Data2Vec:
    config = getattr(Data2VecConfig, modality)("base")
    encoder = dataclasses.replace(config.encoder, **SMALL)
    targets = dataclasses.replace(config.targets, top_k=2)
    config = dataclasses.replace(config, encoder=encoder, targets=targets) if modality != "image" else config
    if modality == "speech":
        frontend = dataclasses.replace(config.frontend, conv_layers=((16, 10, 5), (16, 8, 8), (16, 4, 4)))
    elif modality == "text":
        frontend = dataclasses.replace(config.frontend, vocab_size=261, max_positions=12)
    else:
        frontend = dataclasses.replace(config.frontend, image_size=16, patch_size=4)
        config = dataclasses.replace(
            config, frontend=frontend, encoder=encoder, targets=targets, mask=BlockMask(num_masked=8, min_block=2)
        )
    torch.manual_seed(seed)
    return Data2Vec(dataclasses.replace(config, frontend=frontend))


def write_tones(folder, label, pitch, count, rng, seconds=0.6):
    (folder / label).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        time = np.arange(int(16_000 * seconds * rng.uniform(0.7, 1.3))) / 16_000
        tone = np.sin(2 * np.pi * pitch * rng.uniform(0.9, 1.1) * time) + 0.3 * rng.standard_normal(len(time))
        soundfile.write(folder / label / f"{index}.wav", 0.2 * tone, 16_000)


@pytest.fixture
def tones(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        write_tones(tmp_path / part, "low", 300, count, rng)
        write_tones(tmp_path / part, "high", 2000, count, rng)
    return tmp_path


@pytest.fixture
def tokenizer(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<mask>"])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def run(modality, folder, **keywords):
    model = make_model(modality)
    config = keywords.pop("config", ProbeConfig(batch_size=4))
    suffix = ".tsv" if modality == "text" else ""
    return probe(model, untrained_like(model), folder / f"train{suffix}", folder / f"test{suffix}", config, **keywords)


def test_speech_rows_and_counts(tones):
    result = run("speech", tones)
    assert [row.name for row in result.rows] == ["pretrained", "untrained", "log-mel mean and std"]
    assert (result.num_train, result.num_test, result.classes) == (24, 12, ("high", "low"))
    assert result.chance == 0.5 and result.skipped == ()
    assert [row.features for row in result.rows] == [32, 32, 160]
    plain = result.row("log-mel mean and std")
    assert plain.test_accuracy == 1.0 and plain.test_stderr == 0.0


def test_random_labels_stay_near_chance(tmp_path):
    rng = np.random.default_rng(1)
    for part in ("train", "test"):
        for label in ("a", "b"):
            write_tones(tmp_path / part, label, 500, 20, rng, seconds=0.2)
    result = run("speech", tmp_path)
    assert all(0.2 <= row.test_accuracy <= 0.8 for row in result.rows)


def test_result_is_deterministic_and_leaves_models_and_generator_alone(tones):
    model = make_model("speech").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    arguments = (model, untrained_like(model, 3), tones / "train", tones / "test", ProbeConfig(batch_size=5))
    first, second = probe(*arguments), probe(*arguments)
    assert first == second
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_untrained_like_depends_on_its_seed_only():
    model = make_model("image")
    one, same, other = untrained_like(model, 1), untrained_like(model, 1), untrained_like(model, 2)
    weights = [m.frontend.proj.weight for m in (one, same, other, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])
    assert one.config == model.config


def test_result_survives_json(tones):
    result = run("speech", tones)
    assert ProbeResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_table_shows_every_row(tones):
    (tones / "test/low/broken.wav").write_bytes(b"")
    lines = run("speech", tones).table().splitlines()
    assert lines[0] == "speech probe: 24 train, 12 test, 2 classes, layer average"
    assert [line.split()[0] for line in lines[2:]] == ["chance", "pretrained", "untrained", "log-mel", "skipped"]
    assert lines[2].endswith(" 50.0") and lines[5].split()[-4:] == ["160", "100.0", "100.0", "0.0"]


def test_broken_files_are_named_and_skipped(tones):
    (tones / "train/low/broken.wav").write_bytes(b"RIFF nothing")
    soundfile.write(tones / "test/high/short.wav", np.zeros(20), 16_000)
    result = run("speech", tones)
    assert (result.num_train, result.num_test) == (24, 12)
    (broken, _), (short, reason) = result.skipped
    assert broken.endswith("broken.wav") and short.endswith("short.wav") and "20 samples" in reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "expected a folder with one sub-folder per class"),
        ("flat", "expected one sub-folder per class, found none"),
        ("one class", "at least two classes, found only 'low'"),
        ("empty class", "no files for this class"),
        ("broken class", "no readable example of class 'bad'"),
        ("new test class", "classes that .* lacks: other"),
    ],
)
def test_unusable_folders(tones, change, message):
    train, test = tones / "train", tones / "test"
    if change == "missing":
        train = tones / "nowhere"
    elif change == "flat":
        train = tones / "train/low"
    elif change == "one class":
        (train / "high").rename(tones / "elsewhere")
    elif change == "empty class":
        (test / "empty").mkdir()
    elif change == "broken class":
        (train / "bad").mkdir()
        (train / "bad/x.wav").write_bytes(b"")
    else:
        write_tones(test, "other", 900, 1, np.random.default_rng(2))
    model = make_model("speech")
    with pytest.raises(DataError, match=message):
        probe(model, model, train, test)


def test_padding_does_not_change_features(tokenizer):
    model = make_model("text").eval()
    reader = text_reader(model.config.frontend, tokenizer, 4)
    texts = ["ab", "abcdef", "hello world"]
    inputs, padding_mask = reader.collate(texts)
    together = pooled(model, inputs, padding_mask)
    alone = np.concatenate([pooled(model, *reader.collate([text])) for text in texts])
    assert padding_mask.any()
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_features_of_a_clip_do_not_depend_on_the_others(tones):
    model = make_model("speech")
    arguments = (model, model, tones / "train", tones / "test")
    before = probe(*arguments, ProbeConfig(batch_size=1))
    assert probe(*arguments, ProbeConfig(batch_size=7)) == before


def test_clips_are_normalised_then_cut(tmp_path):
    rng = np.random.default_rng(4)
    quiet, loud = rng.standard_normal(8000), 5 * rng.standard_normal(8000)
    samples = 0.01 * np.concatenate([loud[:4000], quiet, loud[4000:]]) + 0.1
    soundfile.write(tmp_path / "x.wav", samples, 16_000, subtype="FLOAT")
    wave = speech_reader(make_model("speech").config.frontend, 0.5, 4).read(tmp_path / "x.wav")
    assert wave.shape == (8000,) and wave.dtype == np.float32
    assert abs(wave.mean()) < 0.02 and 0.2 < wave.std() < 0.4  # the whole file has unit variance, its middle less
    raw = speech_reader(make_model("speech").config.frontend, 0.5, 4, normalize=False).read(tmp_path / "x.wav")
    assert abs(raw.mean() - 0.1) < 0.01 and 0.008 < raw.std() < 0.012


@pytest.mark.parametrize("layer", ["average", 0, 2])
def test_pooling_matches_a_loop(layer):
    model = make_model("text").eval()
    tokens = torch.tensor([[0, 9, 8, 2, 1, 1], [0, 5, 6, 7, 4, 2]])
    padding = tokens == 1
    states = model.hidden_states(tokens, padding)
    chosen = (states[1] + states[2]) / 2 if layer == "average" else states[layer]
    expected = torch.stack([chosen[0, :4].mean(0), chosen[1].mean(0)]).detach().numpy()
    np.testing.assert_allclose(pooled(model, tokens, padding, layer), expected, atol=1e-6)


def test_pooling_leaves_out_the_class_token():
    model = make_model("image").eval()
    images = torch.randn(3, 3, 16, 16)
    expected = model.hidden_states(images)[2][:, 1:].mean(1).detach().numpy()
    np.testing.assert_allclose(pooled(model, images, None, 2), expected, atol=1e-6)


def test_images(tmp_path):
    rng = np.random.default_rng(5)
    for part, count in (("train", 10), ("test", 5)):
        for label, low in (("dark", 0), ("light", 150)):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(low, low + 100, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{index}.png")
    (tmp_path / "train/dark/notes.txt").write_text("not an image")
    result = run("image", tmp_path)
    assert result.row("raw pixels").features == 16 * 16 * 3
    assert all(row.test_accuracy == 1.0 for row in result.rows)
    assert [name.rsplit("/", 1)[-1] for name, _ in result.skipped] == ["notes.txt"]


def test_image_statistics_of_pretraining_are_the_default():
    frontend = make_model("image").config.frontend
    image = np.full((16, 16, 3), 51, np.uint8)  # 0.2
    colour, _ = image_reader(frontend, None, None, 4).collate([image])
    expected = (0.2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(colour[0, :, 3, 5], expected)
    grey, _ = image_reader(dataclasses.replace(frontend, channels=1), None, None, 4).collate([image[..., :1]])
    torch.testing.assert_close(grey, torch.full((1, 1, 16, 16), -0.6))


def test_image_statistics_need_one_value_per_channel(tmp_path):
    with pytest.raises(ValueError, match="mean and std must have 3 values"):
        run("image", tmp_path, config=ProbeConfig(mean=(0.5,), std=(0.5,)))


def test_text(tmp_path, tokenizer):
    for part, count in (("train", 12), ("test", 6)):
        lines = [f"yes\tgood {'o' * (i % 9)} yes" for i in range(count)] + [f"no\tbad {'x' * i}" for i in range(count)]
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    result = run("text", tmp_path, tokenizer=tokenizer)
    assert (result.num_train, result.num_test) == (24, 12)
    assert result.row("bytes and byte pairs").test_accuracy == 1.0


def test_text_inputs(tokenizer):
    frontend = make_model("text").config.frontend
    reader = text_reader(frontend, tokenizer, 4)
    tokens, padding = reader.collate(["ab", "a" * 40, "é"])
    assert tokens.shape == (3, 12) and tokens.dtype == torch.int64  # cut to max_positions
    assert tokens[:, 0].tolist() == [0, 0, 0] and tokens[1, -1] == 2
    assert tokens[0, 3] == 2 and tokens[0, 4:].eq(1).all()
    assert torch.equal(padding, tokens == 1)
    assert reader.collate(["ab"])[1] is None
    spelled, _ = reader.collate(["<mask>"])  # plain text, as in pretraining
    assert spelled.shape == (1, 8) and frontend.mask_index not in spelled
    counts = reader.plain(["é", "aa"])
    assert counts.shape == (2, 2**16) and counts[0].nnz == 3 and counts[1].nnz == 2  # two bytes and their pair


@pytest.mark.parametrize("content", ["label without tab\n", "\tno label\n", "no text\t \n", "", b"\xff\xfe"])
def test_unusable_text_files(tmp_path, tokenizer, content):
    path = tmp_path / "train.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"train\.tsv.*label<TAB>text"):
        run("text", tmp_path, tokenizer=tokenizer)


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be the path"):
        run("text", tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json cannot be read"):
        run("text", tmp_path, tokenizer=tmp_path / "bad.json")


def test_layer_must_exist(tones):
    with pytest.raises(ValueError, match=r"layer must be 'average' or in 0\.\.2, got 3"):
        run("speech", tones, config=ProbeConfig(layer=3))


@pytest.mark.parametrize(
    "change",
    [
        {"layer": -1},
        {"layer": "last"},
        {"batch_size": 0},
        {"max_seconds": 0},
        {"max_examples": 0},
        {"std": (1.0, 0.0, 1.0)},
    ],
)
def test_bad_settings(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ProbeConfig(**change)


def test_log_mel_bands_follow_the_pitch():
    time = np.arange(8000) / 16_000
    bands = [
        int(log_mel_statistics(np.sin(2 * np.pi * pitch * time).astype(np.float32))[:80].argmax())
        for pitch in (200, 1000, 4000)
    ]
    # band centres are evenly spaced in mel: 2595 log10(1 + f / 700), 2840 mel at 8 kHz
    expected = [81 * 2595 * np.log10(1 + pitch / 700) / 2840.02 - 1 for pitch in (200, 1000, 4000)]
    np.testing.assert_allclose(bands, expected, atol=1)
    assert log_mel_statistics(np.zeros(100, np.float32)).shape == (160,)


def save_run(folder, model, data):
    content = {"format": 1, "model": model.state_dict()}
    content |= {"d2v_fast": "", "data": {"fingerprint": "", "description": ""}, "optimizer": {}, "world_size": 1}
    content["progress"] = {"update": 1, "epoch": 0, "index": 0}
    content["config"] = {"model": dataclasses.asdict(model.config), "data": data}
    torch.save(content, folder / "checkpoint-00000001.pt")
    return folder / "checkpoint-00000001.pt"


def test_checkpoint(tmp_path, tokenizer):
    lines = [f"yes\tgood {'o' * (i % 9)}" for i in range(8)] + [f"no\tbad {'x' * i}" for i in range(8)]
    (tmp_path / "train.tsv").write_text("\n".join(lines), encoding="utf-8")
    model = make_model("text", seed=5)
    path, train = save_run(tmp_path, model, {}), tmp_path / "train.tsv"
    result = probe_checkpoint(path, train, train, layer="1", seed=2)
    assert result == probe(model, untrained_like(model, 2), train, train, ProbeConfig(layer=1), tokenizer=tokenizer)
    for layer in ("3", "-1", "last"):
        with pytest.raises(ConfigError, match=r"layer must be 'average' or in 0\.\.2"):
            probe_checkpoint(path, train, train, layer=layer)


def test_checkpoint_brings_its_normalisation_and_is_read_once(tones, monkeypatch):
    model, seen, reads = make_model("speech"), [], []
    path = save_run(tones, model, {"normalize": False})
    read = checkpoint.read
    monkeypatch.setattr("d2v_fast.train.probe.probe", lambda *args, **kwargs: seen.append(args[4]))
    monkeypatch.setattr(checkpoint, "read", lambda *args: reads.append(args) or read(*args))
    probe_checkpoint(path, tones / "train", tones / "test")
    assert [config.normalize for config in seen] == [False] and len(reads) == 1


def test_max_examples_keeps_every_class_and_spreads():
    examples = [(index, "many" if index < 90 else "few") for index in range(100)] + [(100, "one")]
    kept = _spread(examples, 20)
    assert [item for item, label in kept if label == "many"] == [i * 90 // 17 for i in range(17)]
    assert [item for item, label in kept if label != "many"] == [90, 100]
    assert _spread(examples, None) is examples and _spread(examples, 101) is examples


def test_max_examples_limits_both_parts(tones):
    result = run("speech", tones, config=ProbeConfig(max_examples=8))
    assert (result.num_train, result.num_test) == (8, 8)


def test_checkpoint_brings_its_image_statistics(tmp_path):
    for label, level in (("dark", 50), ("light", 200)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (16, 16), (level + index,) * 3).save(tmp_path / "train" / label / f"{index}.png")
    model, train = make_model("image"), tmp_path / "train"
    path = save_run(tmp_path, model, {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]})
    settings = ProbeConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert probe_checkpoint(path, train, train) == probe(model, untrained_like(model), train, train, settings)
