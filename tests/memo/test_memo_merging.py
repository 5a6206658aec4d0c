"""Merging gives the closed forms of the papers, on tensors, checkpoints and adapters (fact D7)."""

from __future__ import annotations

import errno
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mem_triton.systems.memo.merging import checkpoints
from mem_triton.systems.memo.merging.adapters import merge_adapters, read_adapter
from mem_triton.systems.memo.merging.arithmetic import METHODS, MergeError, MergeRecipe, merge, slerp
from mem_triton.systems.memo.merging.checkpoints import RECORD, merge_checkpoints
from mem_triton.systems.memo.merging.into_base import merge_into_base

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
A = BASE + torch.tensor([4.0, -3.0, 2.0, 0.5, 0.1, 1.0])
B = BASE + torch.tensor([-2.0, -5.0, 4.0, 0.2, 3.0, -1.0])
C = BASE + torch.tensor([1.0, 6.0, -0.5, 0.3, -4.0, 2.0])


def merged(method, models, base=BASE, **recipe):
    return merge(MergeRecipe(method, **recipe), models, base)


def near(result, *expected):
    assert torch.allclose(result - BASE, torch.tensor(expected, dtype=result.dtype), atol=1e-6), result - BASE


def test_d7_linear_is_the_weighted_sum_and_by_itself_the_mean():
    assert torch.equal(merged("linear", [A], None), A)
    assert torch.allclose(merged("linear", [A, B], None), (A + B) / 2)
    assert torch.allclose(merged("linear", [A, B, C], None), (A + B + C) / 3)
    assert torch.allclose(merged("linear", [A, B], None, weights=(0.7, 0.3)), 0.7 * A + 0.3 * B)


def test_d7_task_arithmetic_adds_differences_and_subtracts_them():
    assert torch.allclose(merged("task", [A]), A)
    assert torch.allclose(merged("task", [A, B, C]), A + B + C - 2 * BASE)
    assert torch.allclose(merged("task", [A, B], weights=(0.5, -1.0)), BASE + 0.5 * (A - BASE) - (B - BASE))
    assert torch.allclose(merged("task", [A, B], scale=0.3), BASE + 0.3 * (A + B - 2 * BASE))


def test_d7_ties_trims_elects_by_the_total_and_takes_the_mean_of_those_that_agree():
    """By hand, density 1/2: of each difference the three greatest values stay.

    A keeps 4 -3 2 0 0 0; B keeps 0 -5 4 0 3 0; C keeps 0 6 0 0 -4 2. Totals 4 -2 6 0 -1 2.
    """
    near(merged("ties", [A], density=0.5), 4, -3, 2, 0, 0, 0)
    near(merged("ties", [A, B], density=0.5), 4, -4, 3, 0, 3, 0)
    near(merged("ties", [A, B, C], density=0.5), 4, -4, 3, 0, -4, 2)
    near(merged("ties", [A, B, C], density=0.5, scale=0.5), 2, -2, 1.5, 0, -2, 1)


def test_d7_weights_of_ties_count_in_election_and_mean():
    """peft scales after the trim instead, so that two halves would halve what one model alone changes."""
    near(merged("ties", [A, B], density=0.5, weights=(0.5, 0.5)), 4, -4, 3, 0, 3, 0)
    near(merged("ties", [A, B], density=0.5, weights=(3.0, 1.0)), 4, -3.5, 2.5, 0, 3, 0)
    near(merged("ties", [A, C], density=0.5, weights=(3.0, 1.0)), 4, -3, 2, 0, -4, 2)  # -9 against 6
    near(merged("ties", [A, C], density=0.5, weights=(1.0, 1.0)), 4, 6, 2, 0, -4, 2)  # -3 against 6
    near(merged("ties", [A, B], density=0.5, weights=(1.0, -1.0)), 4, 5, -4, 0, -3, 0)  # B turned round: 5 beats -3


def test_d7_ties_of_equal_and_opposite_changes_takes_the_positive_one():
    """A total of zero counts as positive, as peft elects."""
    opposite = BASE - (A - BASE)
    near(merged("ties", [A, opposite], density=1.0), 4, 3, 2, 0.5, 0.1, 1)


def test_d7_dare_keeps_the_expected_difference():
    wide, base = torch.ones(20000) * 3, torch.ones(20000)
    for method in ("dare_linear", "dare_ties"):
        result = merge(MergeRecipe(method, density=0.3), [wide], base) - base
        values = set(result.unique().tolist())
        assert len(values) == 2 and 0.0 in values and math.isclose(max(values), 2 / 0.3, rel_tol=1e-5)
        assert abs(float((result > 0).float().mean()) - 0.3) < 0.015
        assert torch.allclose(merge(MergeRecipe(method, density=1.0), [wide], base), wide)
    both = merge(MergeRecipe("dare_linear", density=0.5, weights=(0.5, 0.5)), [wide, wide], base) - base
    assert set(both.unique().tolist()) == {0.0, 2.0, 4.0}  # each model drops values of its own


def test_d7_what_dare_drops_depends_on_seed_and_name_alone():
    wide, base = torch.randn(500), torch.zeros(500)
    once = merge(MergeRecipe("dare_linear"), [wide], base, "x")
    before = torch.random.get_rng_state()
    assert torch.equal(merge(MergeRecipe("dare_linear"), [wide], base, "x"), once)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(merge(MergeRecipe("dare_linear", seed=1), [wide], base, "x"), once)
    assert not torch.equal(merge(MergeRecipe("dare_linear"), [wide], base, "y"), once)


def test_d7_slerp_is_the_arc():
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(slerp(right, up, 0), right) and torch.equal(slerp(right, up, 1), up)
    assert torch.allclose(slerp(right, up, 0.5), torch.tensor([0.5, 0.5]).sqrt())
    third = slerp(right, up, 1 / 3)
    assert torch.allclose(third, torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.allclose(slerp(2 * right, up, 0.5), torch.tensor([2.0, 1.0]) * math.sqrt(0.5))


def test_d7_slerp_of_parallel_opposite_and_zero_vectors_is_the_line():
    some = torch.tensor([1.0, 2.0, -3.0])
    assert torch.allclose(slerp(some, 3 * some, 0.5), 2 * some)
    assert torch.allclose(slerp(some, -some, 0.25), 0.5 * some)
    assert torch.allclose(slerp(some, 0 * some, 0.5), 0.5 * some)
    assert torch.equal(slerp(0 * some, 0 * some, 0.5), 0 * some)
    close = some + torch.tensor([1e-8, 0, 0])
    assert torch.isfinite(slerp(some, close, 0.5)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_d7_the_dtype_is_kept(method, dtype):
    """The authors' slerp of nearly parallel tensors in bf16 comes back in fp32."""
    near_a = A + 1e-3
    result = merge(MergeRecipe(method, density=0.5), [A.to(dtype), near_a.to(dtype)], BASE.to(dtype))
    assert result.dtype == dtype and result.shape == A.shape


@given(st.sampled_from(["task", "ties", "dare_linear", "dare_ties"]), st.integers(1, 3), st.integers(0, 9))
def test_d7_models_that_learned_nothing_merge_to_the_base(method, count, seed):
    base = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(merge(MergeRecipe(method), [base] * count, base), base)


def test_d7_control_the_authors_mistake_is_another_result():
    """They pass the trained models alone, so that the first counts as the base and the real one is never subtracted
    (their model_merge/model.py, line 168): task becomes the plain mean, and ties the first model with a trimmed
    difference, without an election."""
    mistaken = merge(MergeRecipe("task", weights=(0.5,)), [B], A)
    assert torch.allclose(mistaken, (A + B) / 2)
    assert not torch.allclose(merged("task", [A, B]), mistaken)
    mistaken = merge(MergeRecipe("ties", density=0.34), [B], A)
    trimmed = (B - A) * torch.tensor([1, 0, 0, 0, 1, 0])  # -6 and 2.9
    assert torch.allclose(mistaken, A + trimmed)
    with pytest.raises(AssertionError):
        near(mistaken, 4, -4, 3, 0, 3, 0)  # what the test of ties above wants


def test_d7_recipes_that_cannot_be_are_refused_by_option():
    cases = [
        (MergeRecipe("sum"), 2, True, "--method"),
        (MergeRecipe("slerp"), 3, True, "takes two models, got 3"),
        (MergeRecipe("linear", weights=(1.0,)), 2, True, "--weights: 1 for 2"),
        (MergeRecipe("ties"), 2, False, "--base"),
        (MergeRecipe("ties", density=0), 2, True, "--density"),
        (MergeRecipe("slerp", t=2), 2, True, "--t"),
        (MergeRecipe("slerp", weights=(0.5, 0.5)), 2, True, "--weights: slerp"),
        (MergeRecipe("linear"), 0, True, "takes models"),
        (MergeRecipe("task", weights=(float("nan"), 1.0)), 2, True, "finite"),
    ]
    for recipe, models, based, said in cases:
        with pytest.raises(MergeError, match=said):
            recipe.check(models, based)


def model(folder, seed, shards=1, **changes):
    made = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}.weight": torch.randn(8, 6, generator=made).bfloat16() for i in range(4)}
    tensors |= {"steps": torch.tensor([7])} | changes
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_d7_checkpoints_merge_tensor_by_tensor_in_their_layout(tmp_path, shards):
    a, b = (model(tmp_path / name, seed, shards) for name, seed in (("a", 1), ("b", 2)))
    base = model(tmp_path / "base", 0)
    told = merge_checkpoints(MergeRecipe("ties", density=0.5), [a, b], base, tmp_path / "out")
    assert told == {"tensors": 5, "changed": 4}
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert out == {path.name for path in a.iterdir()} | {RECORD}
    tensors, firsts, seconds, bases = (
        {k: v for p in f.glob("*.safetensors") for k, v in load_file(p).items()} for f in (tmp_path / "out", a, b, base)
    )
    for name in firsts:
        if name != "steps":
            recipe = MergeRecipe("ties", density=0.5)
            assert torch.equal(tensors[name], merge(recipe, [firsts[name], seconds[name]], bases[name], name))
            assert tensors[name].dtype == torch.bfloat16
    assert torch.equal(tensors["steps"], torch.tensor([7]))
    assert json.loads((tmp_path / "out" / RECORD).read_text())["recipe"]["method"] == "ties"


def test_checkpoints_that_do_not_fit_are_named_and_nothing_is_left(tmp_path):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    others = {
        "layer.0.weight": model(tmp_path / "shape", 3, **{"layer.0.weight": torch.zeros(8, 7)}),
        "extra": model(tmp_path / "extra", 3, extra=torch.zeros(2)),
        "steps: holds whole numbers": model(tmp_path / "steps", 3, steps=torch.tensor([8])),
    }
    (tmp_path / "empty").mkdir()
    others["holds no model.safetensors"] = tmp_path / "empty"
    broken = model(tmp_path / "broken", 3)
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    others["broken/model.safetensors"] = broken
    for said, other in others.items():
        with pytest.raises(MergeError, match=said):
            merge_checkpoints(MergeRecipe("linear"), [a, other], None, tmp_path / "out")
        assert not [p for p in tmp_path.iterdir() if "out" in p.name]
    for path in (a, tmp_path / "a" / "config.json", tmp_path / "none" / "out"):
        with pytest.raises(MergeError, match="--out"):
            merge_checkpoints(MergeRecipe("linear"), [a, b], None, path)


def test_a_full_disk_leaves_no_half_model(tmp_path, monkeypatch):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        merge_checkpoints(MergeRecipe("linear"), [a, b], None, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def adapter(folder, seed, rank=2, alpha=4, modules=("q_proj", "v_proj"), dtype=torch.float32, **config):
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        name = f"base_model.model.layers.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 6, generator=made).to(dtype)
        tensors[f"{name}.lora_B.weight"] = torch.randn(8, rank, generator=made).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": rank, "lora_alpha": alpha, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said | {"target_modules": list(modules)} | config))
    return folder


def deltas(folder):
    return {name: factors.delta for name, factors in read_adapter(folder).modules.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_d7_adapters_that_are_added_are_exact(tmp_path, rslora):
    """As changes of the weights: factors side by side, rank 2 + 3; merging A and B apart has cross terms."""
    a = adapter(tmp_path / "a", 1, use_rslora=rslora)
    b = adapter(tmp_path / "b", 2, rank=3, modules=("q_proj",))
    told = merge_adapters(MergeRecipe("linear", weights=(0.25, -2.0)), [a, b], tmp_path / "out")
    assert told["rank"] == 5 and told["residual"] < 1e-6
    first, second, out = deltas(a), deltas(b), deltas(tmp_path / "out")
    q, v = sorted(first)
    assert torch.allclose(out[q], 0.25 * first[q] - 2 * second[q], atol=1e-5)
    assert torch.allclose(out[v], 0.25 * first[v], atol=1e-5)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (a, a)]
    apart = sum(t[f"{q}.lora_B.weight"] for t in tensors) @ sum(t[f"{q}.lora_A.weight"] for t in tensors)
    assert not torch.allclose(apart, 2 * tensors[0][f"{q}.lora_B.weight"] @ tensors[0][f"{q}.lora_A.weight"])


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "slerp"])
def test_d7_adapters_of_other_methods_are_merged_on_what_they_add(tmp_path, method):
    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    recipe = MergeRecipe(method, density=0.5)
    whole = merge_adapters(recipe, [a, b], tmp_path / "whole", rank=6)
    assert whole["residual"] < 1e-5
    first, second, out = deltas(a), deltas(b), deltas(tmp_path / "whole")
    for name in first:
        expected = merge(recipe, [first[name], second[name]], torch.zeros(8, 6), name)
        assert torch.allclose(out[name], expected, atol=1e-4)
    cut = merge_adapters(recipe, [a, b], tmp_path / "cut")
    assert cut["rank"] == 4 and cut["residual"] < 0.8
    assert (cut["residual"] > 0.01) == (method != "slerp")  # the arc is a sum; what is pruned has the full rank
    spectrum = torch.linalg.svdvals(torch.stack(list(out.values())))
    best = (spectrum[:, 4:].square().sum() / spectrum.square().sum()).sqrt()
    assert cut["residual"] == pytest.approx(float(best), rel=1e-3, abs=1e-5)  # no product of rank 4 is nearer


def test_d7_a_merged_adapter_is_one_of_peft(tmp_path):
    """peft loads it, and the model changes by the sum of what the two change."""
    peft = pytest.importorskip("peft")
    from tests.support.models import tiny_model

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made = peft.get_peft_model(
            tiny_model(),
            peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )
        made.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    merge_adapters(MergeRecipe("task", weights=(0.5, 0.25)), folders, tmp_path / "out")

    def weights(folder):
        loaded = peft.PeftModel.from_pretrained(tiny_model(), folder).merge_and_unload()
        return loaded.state_dict()

    plain = tiny_model().state_dict()
    first, second, out = (weights(folder) for folder in (*folders, tmp_path / "out"))
    changed = 0
    for name, start in plain.items():
        expected = start + 0.5 * (first[name] - start) + 0.25 * (second[name] - start)
        assert torch.allclose(out[name], expected, atol=1e-5), name
        changed += not torch.equal(out[name], start)
    assert changed == 4


@pytest.mark.parametrize("method", ["linear", "task", "ties"])
def test_d7_adapters_in_their_base_are_the_model_that_peft_merges(tmp_path, method):
    """One adapter by itself is added whole; two as their method says."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.support.models import save_tiny_model

    base, folders = save_tiny_model(tmp_path / "base", "llama"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )
        made.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))

    def weights(folder):
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(loaded, folder).merge_and_unload().state_dict()

    plain, first, second = load_file(base / "model.safetensors"), weights(folders[0]), weights(folders[1])
    alone = merge_into_base(MergeRecipe("linear"), folders[:1], base, tmp_path / "alone")
    merge_into_base(MergeRecipe(method, density=0.5), folders, base, tmp_path / "both")
    out, both = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    assert alone == {"tensors": len(plain), "changed": 4} and out.keys() == plain.keys()
    for name, start in plain.items():
        assert torch.allclose(out[name], first[name], atol=1e-6) and out[name].dtype == start.dtype, name
        expected = merge(MergeRecipe(method, density=0.5), [first[name], second[name]], start, name)
        assert torch.allclose(both[name], expected, atol=1e-5), name
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {path.name for path in base.iterdir()} | {RECORD}


def test_adapters_that_do_not_fit_their_base_are_named_and_nothing_is_left(tmp_path):
    a, q = adapter(tmp_path / "a", 1, modules=("q_proj",)), "layers.0.q_proj.weight"
    cases = {
        "has no such weight; is it their base": {},
        r"\[8, 7\] in .*shape and \[8, 6\] in": {q: torch.zeros(8, 7)},
        "plain weights alone": {q: torch.zeros(8, 6).to(torch.int8)},
        "holds it as torch.float8": {q: torch.zeros(8, 6).to(torch.float8_e4m3fn)},
    }
    for (said, changes), name in zip(cases.items(), ("none", "shape", "int", "float8"), strict=True):
        base = model(tmp_path / name, 0, **changes)
        with pytest.raises(MergeError, match=said):
            merge_into_base(MergeRecipe("linear"), [a], base, tmp_path / "out")
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    base = model(tmp_path / "bf16", 0, **{q: torch.ones(8, 6).bfloat16()})
    merge_into_base(MergeRecipe("linear"), [a], base, tmp_path / "out")
    (delta,) = deltas(a).values()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[q], (1 + delta).bfloat16())


def test_adapters_that_cannot_be_merged_are_named(tmp_path):
    a = adapter(tmp_path / "a", 1)
    cases = {
        "is for the base model other": adapter(tmp_path / "1", 2, base_model_name_or_path="other"),
        "use_dora is set": adapter(tmp_path / "2", 2, use_dora=True),
        "bias 'all' is trained": adapter(tmp_path / "3", 2, bias="all"),
        "peft_type is not LORA": adapter(tmp_path / "4", 2, peft_type="IA3"),
        "lora_alpha is no number": adapter(tmp_path / "5", 2, lora_alpha="much"),
        "cannot be read as an adapter": adapter(tmp_path / "6", 2),
        "is no factor of a linear layer": adapter(tmp_path / "7", 2),
        "has another shape": adapter(tmp_path / "8", 2),
    }
    (tmp_path / "6" / "adapter_model.safetensors").write_bytes(b"x")
    for folder, tensors in (
        ("7", {"embed.lora_embedding_A": torch.zeros(2, 2)}),
        (
            "8",
            {
                "base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(2, 9),
                "base_model.model.layers.0.q_proj.lora_B.weight": torch.zeros(8, 2),
            },
        ),
    ):
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
    for said, other in cases.items():
        with pytest.raises(MergeError, match=said):
            merge_adapters(MergeRecipe("linear"), [a, other], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_command_merges_both_kinds(tmp_path, monkeypatch, capsys):
    from tests.memo.test_memo_cli import command

    a, b = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    m, n, base = (model(tmp_path / name, seed) for seed, name in enumerate("mno"))
    code, out, _ = command(
        monkeypatch,
        capsys,
        "merge",
        a,
        b,
        "--out",
        tmp_path / "1",
        "--method",
        "linear",
        "--weights",
        "0.5,0.5",
        "--json",
    )
    assert code == 0 and json.loads(out)["rank"] == 4
    code, out, _ = command(monkeypatch, capsys, "merge", m, n, "--base", base, "--out", tmp_path / "2")
    assert code == 0 and "changed  4" in out
    for arguments, said in {
        (m, n, "--weights", "x"): "--weights",
        (m, n, "--rank", "2"): "--rank",
        (m, n, "--into-base", "--base", base): "--into-base: is of adapters",
        (m, n, "--method", "sum"): "--method",
        (m, n): "--base",
        (m, n, a): "some are adapters",
        (a, b, "--base", base): "--base: is of whole models",
        (a, "--into-base"): "--base: name the model",
        (a, "--into-base", "--base", base, "--rank", 2): "--rank: a whole model has none",
    }.items():
        code, out, err = command(monkeypatch, capsys, "merge", *arguments, "--out", tmp_path / "3")
        assert code == 2 and said in err and err.count("\n") == 1, err
    q = model(tmp_path / "q", 0, **{f"layers.0.{name}.weight": torch.zeros(8, 6) for name in ("q_proj", "v_proj")})
    code, out, _ = command(monkeypatch, capsys, "merge", a, "--into-base", "--base", q, "--out", tmp_path / "4")
    assert code == 0 and "changed  2" in out
    assert json.loads((tmp_path / "4" / RECORD).read_text())["recipe"]["method"] == "linear", "of one, nothing is cut"


def test_commands_of_the_page_run(tmp_path):
    from tests.support.documents import PAGES, blocks, commands, mem_triton

    weights = {f"layers.0.{name}.weight": torch.zeros(8, 6) for name in ("q_proj", "v_proj")}
    for seed, name in enumerate(("OLD", "NEW", "M")):
        model(tmp_path / name, seed, **weights)
    for seed, name in enumerate(("OLD-ADAPTER", "NEW-ADAPTER")):
        adapter(tmp_path / name, seed)
    titled = [
        text for title, text in blocks("bash", PAGES["memo.md"]) if title == "run by tests/memo/test_memo_merging.py"
    ]
    for line in commands("".join(titled)):
        mem_triton(tmp_path, line.split()[1:])
    assert all((tmp_path / name / RECORD).exists() for name in ("BOTH", "BOTH-ADAPTER", "WHOLE"))
