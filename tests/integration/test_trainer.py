"""HAM and exact zeros in transformers' Trainer."""

import re

import pytest
import torch
from transformers import TrainerCallback

from hamcli import HAM, HAMFactory, SparsityCallback
from hamcli.errors import NoRunCheckpoint, UsageError
from tests.integration import pico
from tests.sparsity import pico as families

HAM_OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
OPTIMIZERS = {
    "ham": {"optimizer_cls_and_kwargs": (HAMFactory, HAM_OPTIONS)},
    "adamw": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "learning_rate": 1e-2},
}
SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request):
    return OPTIMIZERS[request.param]


# --- HAM alone


def test_ham_in_a_trainer_is_ham_in_a_loop_of_ones_own(tmp_path):
    """Schedule, accumulation and clipping are the Trainer's; the weights are equal to the bit."""
    given = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.05,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
    }
    trainer = pico.trainer(tmp_path, steps=6, **OPTIMIZERS["ham"], **given)
    trainer.train_dataset = [pico.rows(1)[0]] * 48  # one row, so that the order is no matter
    trainer.train()

    model = pico.model().train()
    ham = HAMFactory()(model, **HAM_OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        ham, lambda step: step / 2 if step < 2 else (6 - step) / 4
    )
    row = torch.tensor([pico.rows(1)[0]["input_ids"]] * 4)
    for _ in range(6):
        for _ in range(2):
            num_items = torch.tensor(2 * 4 * 7)
            model(input_ids=row, labels=row, num_items_in_batch=num_items).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        ham.step()
        ham.zero_grad()
        schedule.step()
    pico.assert_same(pico.weights(trainer.model), pico.weights(model))


def test_the_factory_fits_eta_and_clamp_to_the_targets_unless_they_are_given():
    model = pico.model()
    targets = [p for name, p in model.named_parameters() if "proj" in name]
    size = torch.cat([p.detach().flatten() for p in targets]).abs().mean().item()
    for options, eta, clamp in (
        ({}, 0.25e-6 / size, 6.25e-6 / size),
        ({"base": "sgd"}, 0.004, 0.1),
        ({"eta": 0.01, "clamp": 0.5}, 0.01, 0.5),
        ({"scaling": "raw"}, None, 5.0),
    ):
        group = HAMFactory()(model, lr=1e-6, **options).param_groups[0]
        assert group["eta"] == (eta and pytest.approx(eta, rel=0.01))
        assert group["clamp"] == pytest.approx(clamp, rel=0.01)


def test_the_factory_mirrors_the_targets_only_and_leaves_out_what_is_frozen():
    model = pico.model()
    model.model.layers[0].mlp.requires_grad_(False)
    ham = HAMFactory()(model, lr=1e-3, exclude=["auto", "*.q_proj"])
    names = {param: name for name, param in model.named_parameters()}
    mirrored, wide, flat = (
        {names[param] for param in group["params"]} for group in ham.param_groups
    )
    assert len(mirrored) == 2 * 3 + 3  # k, v, o of two layers, the second one's three of the MLP
    assert wide == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    assert all("norm" in name for name in flat)
    assert [group["mirror"] for group in ham.param_groups] == [True, False, False]


def test_the_learning_rate_peak_is_the_factorys_whatever_the_warm_up(tmp_path):
    trainer = pico.trainer(tmp_path, steps=2, warmup_steps=2, **OPTIMIZERS["ham"])
    trainer.train()
    group = trainer.optimizer.optimizer.param_groups[0]
    assert group["lr_peak"] == 1e-2


# --- the zeros


def test_every_checkpoint_and_the_end_hold_the_zeros_of_the_schedule(tmp_path, optimizer):
    callback = SparsityCallback(0.9, freeze_last=0.25, update_every=0.1)
    trainer = pico.trainer(tmp_path, callbacks=[callback], **optimizer, **SAVING)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    names, total = pico.target_names(trainer.model), callback.targets.total
    due = {step: callback.sparsifier.num_zeros_due(step) for step in (3, 6, 9, 12)}
    found = {step: pico.zeros_in(tmp_path / f"checkpoint-{step}", names) for step in due}
    assert found == due
    assert 0 < due[3] < due[6] < due[9] == due[12] == round(0.9 * total)
    assert pico.zeros_in(tmp_path / "end", names) == round(0.9 * total) == callback.num_zeros()
    assert callback.sparsity == callback.num_zeros() / total


def test_one_shot_prunes_before_the_first_step_and_holds(tmp_path, optimizer):
    found = []

    class Counter(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            found.append(callback.num_zeros())

    callback = SparsityCallback(0.5, method="one-shot")
    pico.trainer(tmp_path, steps=3, callbacks=[callback, Counter()], **optimizer).train()
    assert found == [round(0.5 * callback.targets.total)] * 3


def test_patterns_and_other_options_reach_the_sparsifier(tmp_path):
    callback = SparsityCallback(0.5, pattern="2:4", include=["*.mlp.*"])
    trainer = pico.trainer(tmp_path, callbacks=[callback], **OPTIMIZERS["ham"])
    trainer.train()
    for item in callback.targets:
        assert ".mlp." in item.name
        assert set((item.param.reshape(-1, 4) != 0).sum(-1).tolist()) == {2}


def test_low_precision_weights_keep_their_zeros_and_so_do_hams_masters(tmp_path):
    callback = SparsityCallback(0.8)
    model = pico.model().to(torch.bfloat16)
    trainer = pico.trainer(tmp_path, model=model, callbacks=[callback], **OPTIMIZERS["ham"])
    trainer.train()
    ham = trainer.optimizer.optimizer
    assert isinstance(ham, HAM)
    masters = [ham.state[param]["ham_master"] for param in callback.targets.params]
    for mask, master in zip(callback.sparsifier.masks, masters, strict=True):
        assert not bool(master[~mask].any())
    assert callback.num_zeros() == round(0.8 * callback.targets.total)


def test_tied_and_shared_weights_are_counted_once(tmp_path):
    callback = SparsityCallback(0.75)
    trainer = pico.trainer(tmp_path, model=families.llama(tied=True), callbacks=[callback])
    trainer.train()
    assert callback.num_zeros() == round(0.75 * callback.targets.total)
    assert bool(trainer.model.lm_head.weight.all())


# --- going on


@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, optimizer, restores):
    given = {**optimizer, **SAVING, "gradient_accumulation_steps": 2}
    given["restore_callback_states_from_checkpoint"] = restores
    whole = SparsityCallback(0.9, freeze_last=0.25, update_every=0.1)
    unbroken = pico.trainer(tmp_path / "whole", callbacks=[whole], **given)
    unbroken.train()
    for step in (3, 9):  # while masks change, and when they are final
        later = SparsityCallback(0.9, freeze_last=0.25, update_every=0.1)
        resumed = pico.trainer(tmp_path / "resumed", callbacks=[later], **given)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        pico.assert_same(pico.weights(resumed.model), pico.weights(unbroken.model))
        pairs = zip(later.sparsifier.masks, whole.sparsifier.masks, strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)


def test_a_weight_that_trains_through_zero_is_not_taken_for_a_masked_one(tmp_path):
    """Masks of a checkpoint are not guessed from its weights."""

    class Zeroing(TrainerCallback):
        def on_step_end(self, args, state, control, model, **given):
            if state.global_step == 9:
                mask = whole.sparsifier.masks[0]
                whole.targets.params[0].data.view(-1)[mask.flatten().nonzero()[0]] = 0.0

    given = {**OPTIMIZERS["adamw"], **SAVING}
    whole = SparsityCallback(0.9, freeze_last=0.25)
    pico.trainer(tmp_path, callbacks=[whole, Zeroing()], **given).train()
    later = SparsityCallback(0.9, freeze_last=0.25)
    resumed = pico.trainer(tmp_path, callbacks=[later], **given)
    names = pico.target_names(resumed.model)
    exact = round(0.9 * later_total(resumed.model))
    assert pico.zeros_in(tmp_path / "checkpoint-9", names) == exact + 1
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert later.num_zeros() == exact


def later_total(model):
    return sum(dict(model.named_parameters())[name].numel() for name in pico.target_names(model))


def test_a_second_training_of_the_same_trainer_begins_anew(tmp_path):
    callback = SparsityCallback(0.5)
    trainer = pico.trainer(tmp_path, steps=4, callbacks=[callback], **OPTIMIZERS["ham"])
    trainer.train()
    trainer.train()
    assert callback.num_zeros() == round(0.5 * callback.targets.total)


def test_a_checkpoint_without_masks_is_refused(tmp_path):
    pico.trainer(tmp_path, steps=3, **SAVING).train()
    trainer = pico.trainer(tmp_path, callbacks=[SparsityCallback(0.5)])
    with pytest.raises(NoRunCheckpoint, match=r"E807.*step 3: it holds no masks"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (SparsityCallback(0.6), "its target is 0.5, not 0.6"),
        (SparsityCallback(0.5, include=["*.mlp.*"]), "masks are of 14 tensors, 8 of them"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, callback, message):
    first = pico.trainer(tmp_path, steps=6, callbacks=[SparsityCallback(0.5)], **SAVING)
    first.train()
    trainer = pico.trainer(tmp_path, callbacks=[callback])
    with pytest.raises(NoRunCheckpoint, match="E807") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert message in str(caught.value)


# --- the best model, and an early end


def test_the_best_model_is_one_of_those_with_the_final_zeros(tmp_path, optimizer):
    """The first evaluations score highest; what is loaded at the end is sparse all the same."""
    scores = iter([0.9, 0.8, 0.3, 0.2])
    callback = SparsityCallback(0.9, freeze_last=0.25, update_every=0.1)
    trainer = pico.trainer(
        tmp_path,
        callbacks=[callback],
        compute_metrics=lambda _: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        **optimizer,
        **SAVING,
    )
    trainer.train()
    assert callback.sparsifier.last_update == 9
    assert trainer.state.best_global_step == 9
    assert trainer.state.best_metric == 0.3
    names = pico.target_names(trainer.model)
    trainer.save_model(str(tmp_path / "end"))
    assert pico.zeros_in(tmp_path / "end", names) == round(0.9 * callback.targets.total)


class StopsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **given):
        control.should_training_stop = state.global_step == self.step


def test_a_training_that_ends_before_its_last_zeros_says_so(tmp_path):
    callback = SparsityCallback(0.9, freeze_last=0.25)
    trainer = pico.trainer(tmp_path, callbacks=[callback, StopsAt(5)])
    with pytest.warns(
        UserWarning, match="ended at step 5, before the last zeros at step 9"
    ) as seen:
        trainer.train()
    numbers = re.search(r"step 9: ([\d,]+) of ([\d,]+)", str(seen[0].message))
    assert [int(number.replace(",", "")) for number in numbers.groups()] == [
        callback.num_zeros(),
        round(0.9 * callback.targets.total),
    ]


# --- what is refused


def test_words_that_make_no_sense_are_refused_at_once():
    with pytest.raises(ValueError, match="target is 90"):
        SparsityCallback(90)
    with pytest.raises(ValueError, match="one of gradual, one-shot is needed"):
        SparsityCallback(0.9, method="magic")
    with pytest.raises(TypeError, match="freeze_lats"):
        SparsityCallback(0.9, freeze_lats=0.1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
def test_a_model_with_adapters_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pico.model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match=r"E115.*HAMFactory"):
        HAMFactory()(model, lr=1e-3)
    trainer = pico.trainer(tmp_path, model=model, callbacks=[SparsityCallback(0.5)])
    with pytest.raises(UsageError, match=r"E115.*SparsityCallback"):
        trainer.train()
