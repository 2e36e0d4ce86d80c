"""Other people's training loops: HuggingFace's Trainer, accelerate and Lightning train with ours what they train with torch's."""

from __future__ import annotations

import os

import pytest
import torch

from fusedopt import lr_scheduler
from training import MAKERS, OPTIONS, assert_same_weights, each_name, make_batches, make_model, some_names

# What the packages say of themselves and of torch is not ours to mend; what ours says is looked at by explain().
pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = 6


def package(name):
    """The package, or a skip that says how to get it."""
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")


def rows():
    """Single rows with names, as data sets hold them; in order they make the batches."""
    return [{"inputs": x, "targets": y} for batch in make_batches(BATCHES) for x, y in zip(*batch, strict=True)]


def assert_fused(optimizer):
    """The packages wrap models and optimizers, but what is updated stays plain memory."""
    lines = optimizer.explain().splitlines()
    assert lines and all("-> numba" in line for line in lines), lines


# A run that is resumed takes every step that one at once takes.
at_once_or_resumed = pytest.mark.parametrize(
    "resumes", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["resumed", "at once"]
)


# --- HuggingFace's Trainer ---------------------------------------------------------------------------------------------------


class WithLoss(torch.nn.Module):
    """A model that returns its loss, as those of transformers do."""

    def __init__(self):
        super().__init__()
        self.layers = make_model()

    def forward(self, inputs, labels):
        outputs = self.layers(inputs)
        return {"loss": torch.nn.functional.mse_loss(outputs, labels), "logits": outputs}


@pytest.fixture
def no_tracking(monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "WANDB_DISABLED"):
        monkeypatch.setitem(os.environ, variable, "1")


@pytest.mark.usefixtures("no_tracking")
@some_names
@at_once_or_resumed
def test_trainer_of_transformers(name, resumes, tmp_path):
    package("accelerate")
    transformers = package("transformers")
    models = []
    for who, make in MAKERS.items():
        options = {
            "output_dir": str(tmp_path / who),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "save_strategy": "epoch" if resumes else "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "logging_strategy": "no",
            "seed": 3,
        }
        for part in range(1 + resumes):
            model = WithLoss()
            optimizer = make(name, model.parameters())
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(**options),
                train_dataset=[{"inputs": row["inputs"], "labels": row["targets"]} for row in rows()],
                optimizers=(optimizer, None),
            )
            # The second one continues after the first of the two epochs, in a model and an optimizer that know nothing yet.
            trainer.train(resume_from_checkpoint=str(tmp_path / who / f"checkpoint-{BATCHES}") if part else None)
            assert trainer.state.global_step == 2 * BATCHES
            if who == "ours":
                assert_fused(optimizer)
        models.append(model.layers)
    assert_same_weights(name, *models)


# --- accelerate --------------------------------------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("accumulated", [1, 2], ids=["each batch", "two batches together"])
def test_accelerate(name, accumulated, tmp_path):
    accelerate = package("accelerate")
    models = []
    for who, make in MAKERS.items():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)

        def prepared(make=make, accelerator=accelerator):
            model = make_model()
            optimizer = make(name, model.parameters())
            schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
            loader = torch.utils.data.DataLoader(rows(), batch_size=8)
            return model, optimizer, accelerator.prepare(model, optimizer, loader, schedule)

        def train(prepared, accelerator=accelerator):
            model, optimizer, loader, schedule = prepared
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = torch.nn.functional.mse_loss(model(batch["inputs"]), batch["targets"])
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

        *_, first = prepared()
        train(first)
        accelerator.save_state(str(tmp_path / who))
        accelerator.free_memory()
        model, optimizer, second = prepared()
        accelerator.load_state(str(tmp_path / who))
        train(second)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(OPTIONS[name]["lr"] * 0.9 ** (2 * BATCHES // accumulated))
        if who == "ours":
            assert_fused(optimizer)
        models.append(model)
    assert_same_weights(name, *models)


# --- Lightning ---------------------------------------------------------------------------------------------------------------


def lightning_module(lightning, make, name):
    """A model in Lightning's shape, whose step runs the forward and backward passes as its closure."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = make_model()

        def training_step(self, batch, _):
            return torch.nn.functional.mse_loss(self.layers(batch["inputs"]), batch["targets"])

        def configure_optimizers(self):
            optimizer = make(name, self.parameters())
            return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5)}

    return Module()


@each_name
@at_once_or_resumed
def test_lightning(name, resumes, tmp_path):
    lightning = package("lightning")
    models = []
    for who, make in MAKERS.items():
        checkpoint = str(tmp_path / f"{who}.ckpt")
        for epochs in (1, 3) if resumes else (3,):
            module = lightning_module(lightning, make, name)
            trainer = lightning.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=epochs,
                gradient_clip_val=0.5,
                accumulate_grad_batches=2,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=str(tmp_path),
            )
            loader = torch.utils.data.DataLoader(rows(), batch_size=8)
            trainer.fit(module, loader, ckpt_path=checkpoint if epochs == 3 and resumes else None)
            trainer.save_checkpoint(checkpoint)
        (optimizer,) = trainer.optimizers
        assert optimizer.param_groups[0]["lr"] == pytest.approx(OPTIONS[name]["lr"] * 0.5**3)
        if who == "ours":
            assert_fused(optimizer)
        models.append(module.layers)
    assert_same_weights(name, *models)
