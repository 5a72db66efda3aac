"""The benchmark of whole training steps: all sides compute the same, and ours needs less of the CPU than fairseq's."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checks import INTERPRET
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_train_step
import gpu_summary
import measured
import step_gpu
import step_peers
import step_plain
import step_recipes

from d2v_fast.nn import Data2Vec
from d2v_fast.train.config import load_config
from d2v_fast.train.optim import OptimConfig

MODALITIES = ["speech", "text", "image"]
OPTIM = OptimConfig(lr=1e-3, decay_vectors=False, clip_norm=1.0)
LIMIT = 1.3  # of the whole model; convolutions are most of two layers' step, so that it is far above
pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not to be timed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs on this machine's GPU"),
]


def without_dropout(modality):
    config = tiny_config(modality, "fairseq", **NO_DROPOUT)
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    return config


@pytest.mark.parametrize("modality", MODALITIES)
def test_plain_step_computes_the_same(modality):
    """Loss, metrics, gradients, and weights after a step; none of our ops is called."""
    config, batch = without_dropout(modality), tiny_batch(without_dropout(modality))
    ours, plain = Data2Vec(config).train(), Data2Vec(step_plain.plain_config(config)).train()
    plain.load_state_dict(ours.state_dict())
    want = ours(batch)
    with step_plain.plain_ops():
        got = plain(batch)
    for a, b in zip(got, want, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-4)
    got.loss.backward()
    want.loss.backward()
    for (name, p), q in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-3, atol=1e-4, msg=name)
    plain.zero_grad()
    before = [p.clone() for p in plain.parameters()]
    step_plain.plain_step(plain, OPTIM)(batch)
    assert not any(torch.equal(p, old) for p, old in zip(plain.head.parameters(), before[-2:], strict=False))


@pytest.mark.parametrize("modality", MODALITIES)
def test_plain_step_is_one_graph(modality, monkeypatch):
    """What ``torch.compile`` gets has no breaks, which would make it slower than it has to be."""
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    config = without_dropout(modality)
    config = replace(config, encoder=replace(config.encoder, layers=1), targets=replace(config.targets, top_k=1))
    model = Data2Vec(step_plain.plain_config(config)).train()
    before = model.head[0].weight.clone()
    torch._dynamo.reset()
    step_plain.plain_step(model, OPTIM, compiled=True)(tiny_batch(config))
    assert not torch.equal(model.head[0].weight, before)


@pytest.mark.parametrize("restated", [False, True])
@pytest.mark.parametrize("modality", MODALITIES)
def test_peers_compute_the_same(modality, restated):
    """Loss and the norm of all gradients, in both ways of making a step; the names say whose code it is."""
    config = without_dropout(modality)
    ours, batch = Data2Vec(config).train(), tiny_batch(config)
    peer = step_peers.load(ours, restated=restated)
    assert peer.name == {"image": "BEiT, restated"}.get(
        modality, "fairseq" if step_peers.fairseq_is_installed() and not restated else "fairseq, restated"
    )
    wanted = bench_train_step.loss_and_norm(peer.loss(batch), peer.parameters)
    students = [p for p in ours.parameters() if p.requires_grad]
    found = bench_train_step.loss_and_norm(ours(batch).loss / batch.num_masked, students)
    assert found == pytest.approx(wanted, rel=1e-4)
    precision = peer.parameters[0].dtype
    step = peer.as_trained(OPTIM)
    before = peer.loss(batch).item()
    assert before == pytest.approx(wanted["loss"], rel=0.02)
    step(batch)
    assert peer.loss(batch).item() != before
    half = {p.dtype for p in peer.parameters} == {torch.bfloat16}
    assert precision == torch.float32 and half == (modality != "image")


@pytest.mark.parametrize("modality", MODALITIES)
def test_restated_peers_under_autocast(modality):
    """As on a GPU; BEiT's trainer has its teacher in float32 even so."""
    config = without_dropout(modality)
    peer, batch = step_peers.load(Data2Vec(config).train(), restated=True), tiny_batch(config)
    dtypes = []
    if modality == "image":
        teacher = peer.follow.keywords["teacher"].module
        teacher.blocks[0].mlp.fc1.register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
    wanted = peer.loss(batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = peer.loss(batch)
        assert loss.item() == pytest.approx(wanted, rel=0.02) and loss.item() != wanted
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in peer.parameters)
    if modality == "image":
        with torch.autocast("cpu", torch.bfloat16):
            peer.loss(batch, teacher_autocast=False)
        assert dtypes == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("modality", MODALITIES)
def test_providers_make_steps(modality):
    config, batch = without_dropout(modality), tiny_batch(without_dropout(modality))
    for name in set(step_gpu.PROVIDERS) - {step_gpu.GRAPH, step_gpu.COMPILED}:
        built = step_gpu.provider(name, config, OPTIM)
        if built is None:
            assert modality != "image" and name == step_gpu.PATCHED and not step_peers.fairseq_is_installed()
            continue
        step, about = built
        assert ("peer" in about) == (name in step_gpu.PEERS)
        step(batch)
    with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device"):
        step_gpu.provider(step_gpu.GRAPH, config, OPTIM)[0](batch)


def test_order_and_shares():
    """What takes long or may leave an unusable device comes behind all others; the names are those of the tables."""
    order = step_gpu.providers_of("image")
    assert order == list(step_gpu.PROVIDERS) and len(set(order)) == len(order)
    assert order[:2] == [step_gpu.OURS, step_gpu.WRITTEN] and order[-2:] == [step_gpu.GRAPH, step_gpu.COMPILED]
    assert set(order) - set(step_gpu.providers_of("text")) == {step_gpu.WRITTEN_TODAY}
    assert step_gpu.share(step_gpu.COMPILED) > step_gpu.share(step_gpu.GRAPH) == step_gpu.share(step_gpu.OURS)
    for name in ("OURS", "GRAPH", "WRITTEN", "WRITTEN_TODAY", "WRITTEN_AUTOCAST"):
        assert getattr(step_gpu, name) == getattr(measured, name)
    assert step_gpu.COMPILED in measured.COMPILED


def test_precision_of_references(monkeypatch):
    """TF32 in products only as BEiT's code has it with the PyTorch it pins; AdamW as that code calls it."""
    seen = {}

    def look(name, *_):
        seen[name] = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return {"status": "ok"}

    monkeypatch.setattr(step_gpu, "_measure", look)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for name in step_gpu.PROVIDERS:
        step_gpu._row(name, None, None, OPTIM, RATES, COUNTS, 1.0)
    assert {name for name, (products, _) in seen.items() if products} == {step_gpu.WRITTEN}
    assert all(convolutions for _, convolutions in seen.values())
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    with pytest.raises(KeyError), step_peers.tf32(products=True, convolutions=False):
        raise KeyError
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    optimizer = step_peers.load(Data2Vec(without_dropout("image")).train()).optimizer(OPTIM)
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["foreach"] is None and not group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_flop(modality):
    """By formula and counted: student and teacher alike, nothing left out. ``test_flops.py`` has speech."""
    config = replace(without_dropout(modality), targets=tiny_config(modality).targets)
    config = step_plain.plain_config(config)
    config = replace(config, encoder=replace(config.encoder, attention_backend="sdpa_math"))
    batch, counter = tiny_batch(config), FlopCounterMode(display=False)
    model = Data2Vec(config)
    with counter, step_plain.plain_ops():
        model(batch).loss.backward()
    assert step_gpu.step_tflop(tiny_config(modality), batch) == pytest.approx(counter.get_total_flops() / 1e12, rel=0.1)


@pytest.mark.parametrize("name", step_recipes.RECIPES)
def test_recipes_are_the_presets(name):
    recipe, preset = step_recipes.RECIPES[name], load_config(name, ["data.path=x", "model.profile=fairseq"])
    config = step_recipes.make_config(recipe.modality, recipe.model)
    assert recipe.optim == preset.optim
    assert config == replace(preset.model, encoder=replace(preset.model.encoder, layerdrop=0.0))
    if recipe.modality == "speech":  # as many equal clips of even frames as come closest
        assert recipe.rows * recipe.size == pytest.approx(preset.data.max_tokens, rel=0.015)
        assert config.frontend.num_frames(recipe.size) == {15: 780, 4: 938}[recipe.rows]
    else:
        assert recipe.rows == preset.data.batch_size
        assert recipe.size == (preset.data.tokens_per_sample if recipe.modality == "text" else 224)


# TFLOP of an update, counted on the reference code; 1 to 2 % are attention that is computed a second time in backward
TFLOP = {"speech_base": 13.28, "speech_large": 11.94, "image_base": 18.13, "image_large": 31.69, "text_base": 6.30}


@pytest.mark.parametrize("name", TFLOP)
def test_tflop_of_recipes(name):
    recipe = step_recipes.RECIPES[name]
    config = step_recipes.make_config(recipe.modality, recipe.model)
    batch = step_recipes.random_batch(config, recipe.rows, recipe.size)
    assert step_gpu.step_tflop(config, batch) == pytest.approx(TFLOP[name], rel=0.02)


@pytest.mark.parametrize("wrong", [None, "peer", "plain", "gradients"])
def test_nothing_is_timed_that_computes_something_else(monkeypatch, wrong):
    if wrong == "plain":
        loss = step_plain._data2vec_loss
        more = lambda *x, **how: (out := loss(*x, **how))._replace(loss=1.001 * out.loss)  # noqa: E731
        monkeypatch.setattr(step_plain, "_data2vec_loss", more)
    elif wrong is not None:
        load, factor = step_peers.load, {"peer": 1.001, "gradients": 1.0}[wrong]

        def loaded(ours):
            peer = load(ours)
            parameters = peer.parameters[:-4] if wrong == "gradients" else peer.parameters
            return replace(peer, loss=lambda batch: factor * peer.loss(batch), parameters=parameters)

        monkeypatch.setattr(step_peers, "load", loaded)
    monkeypatch.setattr(bench_train_step, "make_config", lambda *_, **__: without_dropout("image"))
    monkeypatch.setattr(bench_train_step, "random_batch", lambda config, *_: tiny_batch(config))
    if wrong is None:
        bench_train_step.check_equal("image")
        return
    with pytest.raises(SystemExit, match="nothing was timed"):
        bench_train_step.check_equal("image")


COUNTS = step_gpu.Counts(warm_up=3, rounds=4, least=2)
RATES = step_gpu.Rates(matmul=700.0, peak=1000.0)


def test_a_row(monkeypatch):
    config = without_dropout("text")
    batch = tiny_batch(config)
    row = step_gpu.measure(step_gpu.OURS, config, batch, OPTIM, RATES, COUNTS, 60.0)
    assert (row["status"], row["warm_up"], row["rounds"]) == ("ok", 3, 4)
    assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["wall_ms"] <= 4 * row["ms_p80"]
    assert row["units_per_s"] == pytest.approx(batch.inputs.numel() / row["ms"] * 1e3)
    assert row["percent_of_matmul"] == pytest.approx(100 * row["tflop"] / row["ms"] * 1e3 / 700.0)
    unpruned = step_gpu.measure(step_gpu.UNPRUNED, config, batch, OPTIM, RATES, COUNTS, 60.0)
    assert row["computed_tflop"] < row["tflop"] == unpruned["computed_tflop"] == unpruned["tflop"]
    assert 100 * unpruned["mfu"] == pytest.approx(unpruned["percent_of_peak"])
    assert 100 * row["mfu"] < row["percent_of_peak"] == pytest.approx(0.7 * row["percent_of_matmul"])
    hurried = step_gpu.measure(step_gpu.EAGER, config, batch, OPTIM, replace(RATES, peak=None), COUNTS, 0.0)
    assert (hurried["warm_up"], hurried["rounds"]) == (2, 2) and "mfu" not in hurried


def test_a_provider_that_fails_is_a_row(monkeypatch):
    def fail(name, config, optim):
        error = {"a": torch.OutOfMemoryError("no"), "b": RuntimeError("first\nsecond")}.get(name)
        if error is None:
            raise RuntimeError("not captured") from torch.OutOfMemoryError("no")
        raise error

    monkeypatch.setattr(step_gpu, "provider", fail)
    arguments = (None, None, OPTIM, RATES, COUNTS, 60.0)
    assert step_gpu.measure("a", *arguments) == {"status": step_gpu.OUT_OF_MEMORY}
    assert step_gpu.measure("b", *arguments) == {"status": "failed: RuntimeError: first"}
    assert step_gpu.measure("c", *arguments) == {"status": step_gpu.OUT_OF_MEMORY}


def test_nothing_left_out(monkeypatch):
    made = []
    monkeypatch.setattr(step_gpu, "Data2Vec", lambda config: made.append(config) or Data2Vec(config))
    for name in (step_gpu.OURS, step_gpu.AGAIN, step_gpu.UNPRUNED):
        step_gpu.provider(name, without_dropout("text"), OPTIM)
    ours, again, unpruned = made
    assert ours == again == replace(unpruned, prune=ours.prune)
    assert any(vars(ours.prune).values()) and not any(vars(unpruned.prune).values())


def test_a_lost_device_is_told(monkeypatch):
    """After a failure only, and where the launches could not be counted, whose row keeps its times."""
    assert step_gpu.device_works()
    lost = []

    def rand(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(*_):
        lost.append(True)
        monkeypatch.setattr(torch, "rand", rand)
        raise RuntimeError("no")

    config, real = without_dropout("text"), torch.rand
    arguments = (config, tiny_batch(config), OPTIM, RATES, COUNTS, 60.0)
    with monkeypatch.context():
        monkeypatch.setattr(step_gpu, "launches", fail)
        row = step_gpu.measure(step_gpu.OURS, *arguments)
        assert (
            row["status"] == "ok" and row["ms"] > 0 and row["device_lost"] and "RuntimeError" in row["launches_failed"]
        )
        monkeypatch.setattr(torch, "rand", real)
        monkeypatch.setattr(step_gpu, "provider", fail)
        assert step_gpu.measure("x", *arguments) == {"status": "failed: RuntimeError: no", "device_lost": True}
    assert len(lost) == 2


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """Runs the command as on a GPU, with tiny models; measured names, and the rows of the file."""
    recipes = {"text_base": step_recipes.Recipe("text", "base", 2, 20, OPTIM)}
    recipes["image_base"] = step_recipes.Recipe("image", "base", 3, 24, OPTIM)
    measured, path = [], tmp_path / "step.json"
    real = step_gpu.measure

    def measure(name, *arguments):
        measured.append(name)
        rows = json.loads(path.read_text())["results"]  # written before it begins
        assert step_gpu.STOPPED in [row["status"] for row in rows if row["provider"] == name]
        if name in failing:
            return {"status": "failed: E: x"} | ({"device_lost": True} if "lost" in failing else {})
        return real(name, *arguments)

    failing: set[str] = set()
    monkeypatch.setattr(bench_train_step, "RECIPES", recipes)
    monkeypatch.setattr(bench_train_step, "make_config", lambda modality, model, layers: without_dropout(modality))
    monkeypatch.setattr(bench_train_step, "check_equal", lambda modality, model: None)
    monkeypatch.setattr(step_gpu, "device_rates", lambda: RATES)
    monkeypatch.setattr(step_gpu, "measure", measure)
    monkeypatch.setattr(bench_train_step, "DEVICE", type("Cuda", (), {"type": "cuda"})())
    monkeypatch.setattr(step_recipes.Batch, "to", lambda batch, *_, **__: batch)

    def run(*arguments, fail=()):
        measured.clear()
        failing.clear()
        failing.update(fail)
        options = ["--json", str(path), "--rounds", "2", "--warm-up", "2", *arguments]
        options += ["--commit", "abc"] * ("--commit" not in arguments)
        bench_train_step.main(options)
        content = json.loads(path.read_text())
        return list(measured), {(row["case"], row["provider"]): row for row in content["results"]}, content

    run.measured = measured
    return run


def test_recipes_are_resumed(on_gpu, capsys):
    some = ["--providers", "d2v_fast", "eager", "as written"]
    with pytest.raises(SystemExit, match=r"^failed: text_base d2v_fast$"):
        on_gpu("--recipe", "text_base", *some, fail={"d2v_fast"})
    names, rows, content = on_gpu("--recipe", "text_base", *some, "--resume")
    assert names == ["d2v_fast"] and content["complete"] and content["matmul_tflop_per_s"] == 700.0
    assert {row["status"] for row in rows.values()} == {"ok"} and rows["text_base", "eager"]["ratio"] > 0
    assert all(row["modality"] == "text" and (row["layers"], row["dim"]) == (3, 32) for row in rows.values())
    eager = rows["text_base", "eager"]
    names, rows, _ = on_gpu("--recipe", "text_base", "image_base", *some, "--resume")
    assert names == some[1:] and rows["text_base", "eager"] == eager
    assert rows["image_base", "as written"]["peer"] == "BEiT, restated"
    names, rows, _ = on_gpu("--recipe", "text_base", *some, "--resume", "--commit", "abd")
    assert names == some[1:] and len(rows) == 3  # of other code: nothing is kept
    names, rows, content = on_gpu("--recipe", "text_base", *some, "--budget", "0")
    assert names == [] and {row["status"] for row in rows.values()} == {step_gpu.OUT_OF_TIME}
    assert not content["complete"] and "out of time" in capsys.readouterr().out


def test_a_file_of_something_else_is_replaced(on_gpu, tmp_path):
    other = {"environment": {}, "benchmark": "train_step", "results": {"text": {}}}  # as on a CPU
    (tmp_path / "step.json").write_text(json.dumps(other))
    names, rows, _ = on_gpu("--recipe", "text_base", "--providers", "d2v_fast", "--resume")
    assert names == ["d2v_fast"] and rows["text_base", "d2v_fast"]["status"] == "ok"


def test_failed_providers_come_last(on_gpu):
    with pytest.raises(SystemExit):
        on_gpu("--recipe", "text_base", "--providers", "d2v_fast", fail={"d2v_fast"})
    names, *_ = on_gpu("--recipe", "text_base", "--providers", "d2v_fast", "eager", "--resume")
    assert names == ["eager", "d2v_fast"]


def test_a_lost_device_ends_the_process(on_gpu, tmp_path):
    """Its culprit alone has failed; the others are measured by the next process, and it comes last of all recipes."""
    command = ["--recipe", "text_base", "image_base", "--providers", "d2v_fast", "as written", "eager", "--resume"]
    with pytest.raises(SystemExit, match="text_base as written left a device on which nothing can be measured"):
        on_gpu(*command, fail={"as written", "lost"})
    rows = {row["provider"]: row for row in json.loads((tmp_path / "step.json").read_text())["results"]}
    assert {name: row["status"] for name, row in rows.items()} == {"d2v_fast": "ok", "as written": "failed: E: x"}
    assert rows["as written"]["tries"] == 1
    with pytest.raises(SystemExit, match="image_base as written left"):
        on_gpu(*command, fail={"as written", "lost"})
    with pytest.raises(SystemExit, match="text_base as written left"):
        on_gpu(*command, fail={"as written", "lost"})
    rows = {(r["case"], r["provider"]): r for r in json.loads((tmp_path / "step.json").read_text())["results"]}
    assert {key for key, row in rows.items() if row["status"] == "ok"} == {
        (recipe, name) for recipe in ("text_base", "image_base") for name in ("d2v_fast", "eager")
    }
    tries = {recipe: rows[recipe, "as written"]["tries"] for recipe in ("text_base", "image_base")}
    assert tries == {"text_base": 2, "image_base": 1}
    names, rows, content = on_gpu(*command)
    assert names == ["as written"] * 2 and content["complete"]


def test_compiled_updates_come_behind_all_recipes(on_gpu):
    some = ["torch.compile", "eager", "as written"]
    with pytest.raises(SystemExit, match="failed: "):
        on_gpu("--recipe", "text_base", "image_base", "--providers", *some, fail=set(some))
    assert on_gpu.measured == [*some[1:], *some[1:], "torch.compile", "torch.compile"]


def test_another_machine(on_gpu, monkeypatch):
    """What it has timed stays where nothing is left; else all is timed again here, and until then has no ratio."""
    monkeypatch.setattr(step_gpu, "machine", lambda: "a")
    some = ["--providers", "d2v_fast", "d2v_fast again", "eager"]
    names, rows, _ = on_gpu("--recipe", "text_base", *some)
    ours = rows["text_base", "d2v_fast"]
    assert ours["noise"] > 0 and ours["mean_ms"] == (ours["ms"] + rows["text_base", "d2v_fast again"]["ms"]) / 2
    monkeypatch.setattr(step_gpu, "machine", lambda: "b")
    names, rows, _ = on_gpu("--recipe", "text_base", *some, "--resume")
    assert names == [] and rows["text_base", "d2v_fast"] == ours
    names, rows, _ = on_gpu("--recipe", "text_base", *some, "as written", "--resume", "--budget", "0")
    assert names == [] and {row["machine"] for row in rows.values() if row["status"] == "ok"} == {"a"}
    names, rows, _ = on_gpu("--recipe", "text_base", *some, "as written", "--resume")
    assert names == [*some[1:], "as written"]
    assert {row["machine"] for row in rows.values()} == {"b"} and all("ratio" in row for row in rows.values())


def test_arguments(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        bench_train_step.main(["--recipe", "text_base"])
    assert "--recipe needs a GPU, here give --modality" in capsys.readouterr().err
    monkeypatch.setattr(bench_train_step, "DEVICE", type("Cuda", (), {"type": "cuda"})())
    with pytest.raises(SystemExit):
        bench_train_step.main(["--modality", "text"])
    assert "on a GPU give --recipe, not --modality" in capsys.readouterr().err


def test_related_rows():
    rows = [
        {"provider": "d2v_fast", "status": "ok", "ms": 2.0, "peak_mib": 5.0},
        {"provider": "as written", "status": "ok", "ms": 6.0, "peak_mib": 20.0},
        {"provider": "eager", "status": step_gpu.OUT_OF_MEMORY},
    ]
    step_gpu.relate(rows)
    assert [(row["ratio"], row["memory_ratio"]) for row in rows[:2]] == [(1.0, 0.25), (3.0, 1.0)]
    assert "ratio" not in rows[2]
    rows.append({"provider": "d2v_fast again", "status": "ok", "ms": 2.5, "peak_mib": 5.0})
    step_gpu.relate(rows)
    assert (rows[0]["mean_ms"], rows[0]["noise"], rows[0]["ratio"]) == (2.25, 0.25, 1.0)
    assert rows[1]["ratio"] == pytest.approx(6 / 2.25)
    for row in rows[1:]:
        row["machine"] = "another"
    step_gpu.relate(rows)
    assert not {"noise", "mean_ms"} & set(rows[0]) and not any("ratio" in row for row in rows[1:])


def test_summary_has_the_steps(tmp_path):
    row = {"case": "text_base", "provider": "d2v_fast", "status": "ok", "ratio": 1.0, "ms": 2.0, "ms_p20": 1.5}
    row |= {"ms_p80": 2.5, "rounds": 9, "warm_up": 8, "samples_per_s": 3.0, "units_per_s": 30.0, "launches": 7}
    row |= {"percent_of_matmul": 4.0, "peak_mib": 5.0, "host_ms": 6.0, "memory_ratio": 0.5, "percent_of_peak": 3.0}
    rows = [row, {"case": "text_base", "provider": "torch.compile", "status": "skipped: out of time"}]
    record = {"environment": {"device": "x", "torch": "y"}, "benchmark": "train_step", "results": rows}
    (tmp_path / "train_step_text_base.json").write_text(json.dumps(record))
    text = gpu_summary.summary([], tmp_path)
    assert "| text_base | d2v_fast | 1.00 | 2.0 | 3.0 | 4.0 | 5 | 6.00 | 7 |" in text
    assert "| text_base | torch.compile | skipped: out of time |" in text
    words = step_gpu.line(row)
    assert "2.0 ms (1.5 to 2.5, 9 updates after 8), 3.0 samples/s, 30 units/s" in words and "5 MiB (0.50 of" in words
    assert "out of time" in step_gpu.line(rows[1])


def test_faster_than_fairseq(capsys):
    """Processor time of one thread, two layers and the whole front-end: neither other programs nor waiting count."""
    pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")
    assert torch.get_num_threads() == 1
    found = bench_train_step.ratios(bench_train_step.measure("speech", rounds=1, layers=2))
    with capsys.disabled():
        for name, r in found.items():
            print(f"\nspeech step, two layers, one thread: processor time of fairseq / {name} = {r['processor']:.2f}")
    assert found["d2v_fast"]["processor"] > LIMIT
    assert found["patched"]["processor"] > 1
