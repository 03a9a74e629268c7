"""Training for the study: one captured step for adapters of several ranks, several of them side by side."""

import copy
import dataclasses

import pytest
import torch
from batches import Rows
from training import Trainer

from benchmarks.composition.groups import Job
from benchmarks.composition.lanes import Lanes
from benchmarks.composition.study import CONTENTS, QUICK, lora
from benchmarks.composition.work import StudyError

LENGTH, BATCH = 16, 4
SIZES = dataclasses.replace(QUICK, length=LENGTH, batch=BATCH, effort=0.05)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")


def rows(seed: int, count: int = 12) -> dict[str, Rows]:
    ids = torch.randint(0, 256, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"": Rows(ids, ids)}


def trained(trainer: Trainer, seed: int, rank: int, steps: int = 5) -> dict[str, torch.Tensor]:
    trainer.restart(seed, rank)
    losses = [loss.item() for loss in trainer.train(rows(seed), steps, seed, {})]
    assert len(losses) == steps
    return trainer.state()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_does_not_depend_on_what_was_trained_before(tiny_model) -> None:
    trainer = Trainer(tiny_model(), lora(8), LENGTH, seed=0, batch=BATCH)
    first = trained(trainer, 1, 8)
    assert not same(first, trained(trainer, 2, 4))
    assert same(first, trained(trainer, 1, 8))


def test_an_adapter_of_lower_rank_is_what_its_own_shape_would_have_given(tiny_model) -> None:
    wide = Trainer(tiny_model(), lora(8), LENGTH, seed=0, batch=BATCH)
    narrow = Trainer(tiny_model(), lora(3), LENGTH, seed=0, batch=BATCH)
    wide.restart(1, 3)
    narrow.restart(2, 3)
    with torch.no_grad():  # the same start
        for name, parameter in narrow.model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(wide.model.get_parameter(name)[:3])
    for trainer in (wide, narrow):
        for _ in trainer.train(rows(0), 6, 0, {}):
            pass
    for key, tensor in narrow.state().items():
        torch.testing.assert_close(wide.state()[key], tensor, rtol=1e-4, atol=1e-6)
    beyond = [p for name, p in wide.model.named_parameters() if ".lora_" in name]
    assert all((p[3:] if p.shape[0] == 8 else p[:, 3:]).eq(0).all() for p in beyond)


def test_a_scaffold_is_active_but_not_trained(tiny_model) -> None:
    base = tiny_model()
    other = Trainer(copy.deepcopy(base), lora(8), LENGTH, seed=3, batch=BATCH)
    scaffold = trained(other, 3, 8, steps=20)
    trainer = Trainer(base, lora(8), LENGTH, seed=0, scaffolded=True, batch=BATCH)

    def loss(scaffolds) -> float:
        trainer.restart(0, 8)
        named = {"other": rows(3)[""]}
        return next(trainer.train(named, 5, 0, scaffolds)).item()

    assert loss({"other": scaffold}) < loss({}) - 0.01
    slots = {name.replace(".scaffold.", "."): slot for name, slot in trainer.slots.items()}
    loss({"other": scaffold})
    assert same(slots, scaffold)


@pytest.mark.parametrize("device", DEVICES)
def test_lanes_train_what_one_trainer_trains_alone(tiny_model, device) -> None:
    base = tiny_model().to(device)
    jobs = [
        Job(f"job-{i}", (dataclasses.replace(CONTENTS["plural"], lora=lora(rank)),)) for i, rank in enumerate((4, 8, 16, 8))
    ]
    found = {}

    def keep(job: Job, state: dict[str, torch.Tensor]) -> None:
        found[job.name] = {key: tensor.cpu() for key, tensor in state.items()}

    Lanes(base, SIZES).train(jobs, lambda job: rows(jobs.index(job)), 5, {}, lambda: True, keep)
    trainer = Trainer(base, lora(16), LENGTH, seed=0, batch=BATCH)
    for index, job in enumerate(jobs):
        trainer.restart(job.seed(5), job.rank)
        for _ in trainer.train(rows(index), round(SIZES.effort * job.steps), job.seed(5), {}):
            pass
        assert same({key: tensor.cpu() for key, tensor in trainer.state().items()}, found[job.name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_a_captured_step_trains_what_an_eager_one_does(tiny_model) -> None:
    trainer = Trainer(tiny_model().to("cuda"), lora(8), LENGTH, seed=0, batch=BATCH)
    captured = trained(trainer, 1, 8)
    trainer.step.graph = None
    for key, tensor in trained(trainer, 1, 8).items():
        torch.testing.assert_close(captured[key], tensor, rtol=1e-2, atol=1e-4)


def test_no_job_is_begun_once_time_is_over_and_those_begun_are_finished(tiny_model) -> None:
    jobs = [Job(name, (CONTENTS[name],)) for name in ("sum", "plural")]
    found, asked = [], iter([True, False, False])
    Lanes(tiny_model(), SIZES).train(
        jobs, lambda job: rows(0), 0, {}, lambda: next(asked), lambda job, _: found.append(job.name)
    )
    assert found == ["sum"]


def test_a_training_that_diverges_stops_with_its_name(tiny_model) -> None:
    base = tiny_model()
    base.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(StudyError, match="training sum diverged"):
        Lanes(base, SIZES).train(
            [Job("sum", (CONTENTS["sum"],))], lambda job: rows(0), 0, {}, lambda: True, lambda job, _: None
        )
