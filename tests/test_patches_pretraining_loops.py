"""Data2VecPretraining in the loops of others: Trainer, accelerate, torch.compile, DistributedDataParallel."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity import relative
from pretraining_models import EMA, draw, encoder, grads, inputs

from d2v_fast import Data2VecConfig, Data2VecPretraining

transformers = pytest.importorskip("transformers")


def test_data_parallel():
    """A replica has other parameters than ours in it: an error, and no wrong numbers."""
    model = Data2VecPretraining(encoder("text"))
    with pytest.raises(ValueError, match="one process a GPU, got a replica of DataParallel: start it with torchrun"):
        model._replicate_for_data_parallel()(**inputs("text"))
    torch.nn.DataParallel(model)(**inputs("text"))  # of no GPU: the model itself


def digits():
    """Real scanned digits [N, 3, 8, 8]."""
    images = pytest.importorskip("sklearn.datasets").load_digits().images[:256]
    x = torch.from_numpy(images).float()[:, None] / 8 - 1
    return [{"pixel_values": image} for image in x.expand(-1, 3, -1, -1)]


BLOCKED = """
import json, sys
sys.modules["d2v_fast"] = None
import torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1])
want = torch.load(sys.argv[2])
state = model.state_dict()
same = state.keys() == want.keys() and all(torch.equal(state[name], x) for name, x in want.items())
print(json.dumps([type(model).__name__, same]))
"""


def test_trainer(tmp_path):
    """20 steps on real images: the loss falls; a resumed run ends with the same bits; plain transformers loads it."""
    pytest.importorskip("accelerate")

    def trainer(folder, **options):
        model = Data2VecPretraining(encoder("image", dropout=0.1), ema=EMA)
        arguments = transformers.TrainingArguments(
            str(folder),
            max_steps=20,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            logging_steps=1,
            save_steps=10,
            eval_strategy="steps",
            eval_steps=10,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        )
        data = digits()
        return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:32], **options)

    whole = trainer(tmp_path / "a")
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert len(losses) == 20 and np.mean(losses[-5:]) < 0.95 * np.mean(losses[:3])
    assert "eval_loss" in whole.state.log_history[-2]
    assert whole.model.num_updates == 20

    resumed = trainer(tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert resumed.model.num_updates == 20
    for name, x in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], x), name

    whole.model.save_pretrained(tmp_path / "model")
    torch.save(whole.model.encoder.state_dict(), tmp_path / "want.pt")
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "model"), str(tmp_path / "want.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["Data2VecVisionModel", True]

    collated = trainer(tmp_path / "b", data_collator=whole.model.collator())
    collated.args.max_steps = 2
    collated.train()
    assert collated.model.num_updates == 2


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    try:
        model = Data2VecPretraining(encoder("image"), ema=EMA)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = torch.utils.data.DataLoader(digits()[:64], 16, collate_fn=model.collator())
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        prepared.train()
        for batch in loader:
            with accelerator.accumulate(prepared):
                out = prepared(**batch)
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
        assert model.num_updates == 2 and torch.isfinite(out.loss)
        accelerator.save_state(str(tmp_path))
        before = {name: x.clone() for name, x in model.state_dict().items()}
        model.update_teacher()
        accelerator.load_state(str(tmp_path))
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_compile():
    """One graph, traced once: updates, the teacher's too, change no number in it."""
    model = Data2VecPretraining(
        encoder("text", num_hidden_layers=1), targets=replace(Data2VecConfig.text().targets, top_k=1)
    ).train()
    batch = draw(model, inputs("text"))
    want = model(batch=batch).loss
    want.backward()
    expected = {name: x.clone() for name, x in grads(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(batch=batch)
    out.loss.backward()
    assert relative(out.loss, want) <= 1e-5
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for update in range(3):
            optimizer.step()
            assert model.num_updates == update + 1
            out = compiled(batch=batch)
            assert relative(out.loss, model(batch=batch).loss) <= 1e-5
            out.loss.backward()


def test_distributed_data_parallel():
    """One process: gradients of all parameters that are waited for, heads and poolers left out."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for modality, kind in (("text", "Model"), ("speech", "ForCTC")):
            model = Data2VecPretraining(encoder(modality, kind, dropout=0.3)).train()
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
            for update in range(3):  # a gradient that did not come is an error at the next forward
                optimizer.zero_grad()
                wrapped(**inputs(modality, seed=update)).loss.backward()
                optimizer.step()
            assert model.num_updates == 3
    finally:
        distributed.destroy_process_group()
