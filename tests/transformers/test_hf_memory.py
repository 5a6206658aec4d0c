"""Memory in transformers, against fp64 oracles and against itself: A1-A3, A6, A7, A10, A13, masks, generate()."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import flash_attention_mask
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from mem_triton.config import ConfigError
from mem_triton.ops.delta_rule.reference import activate, delta_rule
from mem_triton.systems.delta_mem import AdapterError, DeltaMemAdapter
from mem_triton_transformers import (
    apply_mem_triton,
    get_memory,
    remove_mem_triton,
    reset_memory,
    set_memory,
    set_memory_write,
    set_write_segments,
)
from tests.support.models import FAMILIES, VOCAB, random_adapter, tiny_model

CONFIGS = {
    "tsw": {"delta_heads": "q,o"},
    "msw": {"rank": 4, "num_state_heads": 4},
    "uncoupled": {"couple_lambda": False, "state_update_mode": "lambda_outside"},
    "gates_per_head": {"rankwise_gates": False, "num_state_heads": 2, "state_update_mode": "no_lambda"},
    "scale_and_norm": {"trainable_delta_scale": True, "delta_scale_granularity": "head", "delta_o_rmsnorm": True},
}


def flat_mask(module, query, key, value, attention_mask, **kwargs):
    """What a layer sees under flash attention: a 2-D mask or None. Computed by eager attention here."""
    allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        allowed = allowed & attention_mask[:, None, None, :].bool()
    bias = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return eager_attention_forward(module, query, key, value, bias, **kwargs)


AttentionInterface.register("flat_mask", flat_mask)
AttentionMaskInterface.register("flat_mask", flash_attention_mask)
ATTENTIONS = ("eager", "sdpa", "flat_mask")


def with_memory(model: torch.nn.Module, adapter: DeltaMemAdapter | None = None, **config: object) -> torch.nn.Module:
    return apply_mem_triton(model, {"delta": {"adapter": adapter or random_adapter(model, **config)}})


def tokens(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def states_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_a1_empty_frozen_memory_is_the_base_model(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 7)
    base = model(ids).logits
    with_memory(model)
    set_memory_write(model, False)
    assert torch.equal(model(ids).logits, base)
    set_memory(model, {name: torch.zeros(2, 1, 8, 8) for name in (f"model.layers.{i}.self_attn" for i in range(2))})
    assert torch.equal(model(ids).logits, base)  # explicit zeros, through every kernel
    set_memory_write(model, True)
    assert not torch.equal(model(ids).logits, base)  # control: the adapter does something


@pytest.mark.parametrize("family", FAMILIES)
def test_a2_first_token_is_untouched_and_the_second_is_not(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 2)
    base = model(ids).logits
    logits = with_memory(model)(ids).logits
    assert torch.equal(logits[:, 0], base[:, 0])
    assert (logits[:, 1] - base[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("split", [(1, 15), (5, 1, 10), (1,) * 16], ids=str)
def test_a3_splitting_a_sequence_into_calls_changes_nothing(config: dict, split: tuple[int, ...]) -> None:
    model, ids = with_memory(tiny_model(), strength=0.1, **config), tokens(2, 16)
    whole = model(ids).logits
    expected = get_memory(model)
    reset_memory(model)
    cache, pieces = DynamicCache(), []
    for piece in ids.split(split, dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5
    never_forgets = config.get("state_update_mode") == "no_lambda"  # there rounding adds up
    assert largest_difference(get_memory(model), expected) < (2e-6 if never_forgets else 1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a4_every_layer_equals_the_fp64_specification(config: dict, family: str) -> None:
    """In an fp64 model, each projection's output is the stock one plus s W_delta (S_{t-1} q_t), by ``delta_rule``."""
    model, seen = tiny_model(family, dtype=torch.float64), {}
    adapter = random_adapter(model, dtype=torch.float64, **config)
    with_memory(model, adapter)
    for i, layer in enumerate(model.model.layers):
        for head in "qkvo":
            projection = getattr(layer.self_attn, f"{head}_proj")
            projection.register_forward_hook(lambda m, a, out, key=(i, head): seen.update({key: (a[0], out)}))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0  # on the right: stock eager attention gives NaN for left padding in fp64
    model(tokens(2, 11), attention_mask=mask)
    config, spec = adapter.config, adapter.config.spec
    for i, layer in enumerate(model.model.layers):
        t = adapter.layers[f"model.layers.{i}.self_attn"]
        gates = ["beta"] if config.couple_lambda else ["beta", "lambda"]
        down = torch.cat([t[f"memory_{x}_proj"] for x in "qkv"] + [t[f"{gate}_proj"] for gate in gates])
        bias = torch.cat([t[f"{gate}_bias"] for gate in gates])
        scales = config.scales(t.get("delta_scale_raw"))
        for row in range(2):
            hidden = seen[i, "q"][0][row, mask[row].bool()]
            reads, final, _ = delta_rule(activate(hidden @ down.T, bias, spec))
            assert (get_memory(model)[f"model.layers.{i}.self_attn"][row] - final[0]).abs().max() < 1e-12
            for head in "qkvo":
                given, out = (x[row, mask[row].bool()] for x in seen[i, head])
                projection = getattr(layer.self_attn, f"{head}_proj")
                delta = scales[head] * reads.flatten(1) @ t[f"delta_{head}_proj"].T
                if head == "o" and config.delta_o_rmsnorm:
                    delta = delta * (delta.pow(2).mean(-1, keepdim=True) + config.delta_o_rmsnorm_eps).rsqrt()
                    delta = delta * t["delta_o_rmsnorm_weight"]
                stock = torch.nn.functional.linear(given, projection.weight, projection.bias)
                expected = stock + delta if head in config.delta_heads else stock
                assert (out - expected).abs().max() < 1e-12, (i, row, head)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a6_padding_changes_neither_states_nor_reads(side: str, attention: str) -> None:
    model = with_memory(tiny_model(attn_implementation=attention))
    lengths, width = (9, 4, 1), 9
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids, mask = tokens(3, width, seed=11), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - lengths[i], None) if side == "left" else slice(0, lengths[i])
        ids[i, place], mask[i, place] = row[0], 1
    together = model(ids, attention_mask=mask).logits
    batch_states = get_memory(model)
    for i, row in enumerate(rows):
        reset_memory(model)
        assert (together[i, mask[i].bool()] - model(row).logits[0]).abs().max() < 1e-5
        assert largest_difference({k: v[i : i + 1] for k, v in batch_states.items()}, get_memory(model)) < 1e-6
    reset_memory(model)
    model(ids.where(mask.bool(), (ids + 1) % VOCAB), attention_mask=mask)
    assert states_equal(get_memory(model), batch_states)  # other padding, the same bits
    reset_memory(model)
    model(ids)
    assert largest_difference(get_memory(model), batch_states) > 0.01  # control: without a mask, padding is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a6_padding_only_row_keeps_its_state(dtype: torch.dtype) -> None:
    model = with_memory(tiny_model(dtype=dtype))
    model(tokens(2, 5))
    before = get_memory(model)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    model(tokens(2, 3, seed=9), attention_mask=mask)
    for name, state in get_memory(model).items():
        assert torch.equal(state[1], before[name][1]) and not torch.equal(state[0], before[name][0])


@pytest.mark.parametrize("granularity", ["token", "message_mean"])
def test_a6_padding_may_hold_anything(granularity: str) -> None:
    model, ids = with_memory(tiny_model(layers=1), memory_write_granularity=granularity), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    states = []
    for poison in (0.0, torch.nan):

        def overwrite(module, args, kwargs, poison=poison):
            kwargs["hidden_states"] = kwargs["hidden_states"].masked_fill(mask.unsqueeze(-1) == 0, poison)
            return args, kwargs

        handle = model.model.layers[0].self_attn.register_forward_pre_hook(overwrite, with_kwargs=True, prepend=True)
        reset_memory(model)
        if granularity == "message_mean":
            set_write_segments(model, torch.zeros_like(ids))
        model(ids, attention_mask=mask)
        handle.remove()
        states.append(get_memory(model))
    assert states_equal(*states) and all(state.isfinite().all() for state in states[1].values())


def test_a7_rows_of_a_batch_are_isolated() -> None:
    model, ids = with_memory(tiny_model()), tokens(3, 8)
    model(ids)
    before = get_memory(model)
    changed = ids.clone()
    changed[1] = tokens(1, 8, seed=8)
    reset_memory(model)
    model(changed)
    for name, state in get_memory(model).items():
        assert torch.equal(state[[0, 2]], before[name][[0, 2]]) and not torch.equal(state[1], before[name][1])


def test_a7_another_batch_size_is_an_error_and_never_clears_memory() -> None:
    model, ids = with_memory(tiny_model()), tokens(3, 8)
    model(ids)
    before = get_memory(model)
    with pytest.raises(ValueError, match=r"3 sequence\(s\), but this call has batch size 2.*reset_memory"):
        model(ids[:2])
    assert states_equal(get_memory(model), before)


def test_a7_evicting_and_adding_rows_keeps_the_others() -> None:
    model, ids, later = with_memory(tiny_model()), tokens(3, 8), tokens(3, 5, seed=5)
    model(ids)
    first_turn = get_memory(model)
    expected = model(later).logits
    set_memory(model, {name: state[[2, 0]] for name, state in first_turn.items()})  # evict row 1, swap the rest
    assert (model(later[[2, 0]]).logits - expected[[2, 0]]).abs().max() < 1e-5
    set_memory(model, {name: torch.cat([s, s.new_zeros(1, *s.shape[1:])]) for name, s in first_turn.items()})
    four = torch.cat([later, tokens(1, 5, seed=6)])
    logits = model(four).logits  # add a fresh row
    assert (logits[:3] - expected).abs().max() < 1e-5
    reset_memory(model)
    assert (logits[3:] - model(four[3:]).logits).abs().max() < 1e-5


@pytest.mark.parametrize("granularity", ["token", "message_mean"])
def test_a10_frozen_turn_leaves_the_state_bit_identical(granularity: str) -> None:
    model, ids = tiny_model(), tokens(2, 6)
    base = model(ids).logits
    with_memory(model, memory_write_granularity=granularity)
    model(tokens(2, 9, seed=4))
    before = {name: state.clone() for name, state in get_memory(model).items()}
    set_memory_write(model, False)
    frozen = model(ids).logits
    assert states_equal(get_memory(model), before)
    assert (frozen - base).abs().max() > 0.1  # it still reads
    assert (frozen[:, 0] - base[:, 0]).abs().max() > 0.1  # the first token too
    set_memory_write(model, True)
    model(ids)
    assert not states_equal(get_memory(model), before)  # control


class CountMatmuls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.shapes[tuple(args[-1].shape)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", ["q", "o", "q,o", "k,v", "q,k,v,o"])
def test_a13_inactive_heads_produce_no_work(heads: str) -> None:
    model = tiny_model(hidden=48, head_dim=16)  # widths: q 64, k and v 32, o 48
    with_memory(model, delta_heads=heads)
    for head in "qkvo":
        for layer in model.model.layers:
            assert bool(getattr(layer.self_attn, f"{head}_proj")._forward_hooks) == (head in heads)
    model(tokens(1, 3))
    with CountMatmuls() as count:
        model(tokens(1, 3))
    corrections = {"q": (8, 64), "k": (8, 32), "v": (8, 32), "o": (8, 48)}
    wanted = Counter(corrections[head] for head in heads.split(",") for _ in model.model.layers)
    assert {shape: count.shapes[shape] for shape in corrections.values()} == {
        shape: wanted[shape] for shape in corrections.values()
    }


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_turns_on_one_cache_agree_between_attention_implementations(attention: str) -> None:
    """The second turn, several tokens on a cache, is where a layer's 4-D mask misleads."""
    expected, adapter = None, random_adapter(tiny_model())
    for implementation in ("eager", attention):
        model = with_memory(tiny_model(attn_implementation=implementation), adapter)
        cache, mask, logits = DynamicCache(), torch.ones(2, 14, dtype=torch.long), []
        mask[0, :3] = 0
        for begin, end in ((0, 8), (8, 13), (13, 14)):
            piece = tokens(2, 14)[:, begin:end]
            logits.append(model(piece, attention_mask=mask[:, :end], past_key_values=cache).logits)
        result = torch.cat(logits, 1)[mask.bool()], get_memory(model)
        expected = expected or result
    assert (result[0] - expected[0]).abs().max() < 1e-5
    assert largest_difference(result[1], expected[1]) < 1e-6


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_generate_batch_equals_single(family: str, attention: str) -> None:
    model = tiny_model(family, attn_implementation=attention)
    prompts = [tokens(1, n, seed=n) for n in (3, 12, 7)]
    plain = [model.generate(p, max_new_tokens=10, do_sample=False)[0, p.shape[1] :] for p in prompts]
    with_memory(model)
    singles = []
    for prompt in prompts:
        reset_memory(model)
        singles.append(model.generate(prompt, max_new_tokens=10, do_sample=False)[0, prompt.shape[1] :])
    assert any(not torch.equal(a, b) for a, b in zip(plain, singles, strict=True))  # memory changes tokens
    reset_memory(model)
    ids = torch.cat([torch.nn.functional.pad(p, (12 - p.shape[1], 0), value=1) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (12 - p.shape[1], 0)) for p in prompts])
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=1)[:, 12:]
    for row, single in zip(batch, singles, strict=True):
        assert torch.equal(row, single)


def test_memory_outlives_the_context() -> None:
    """A second generate() without the first one's text depends on it, through the state alone."""
    model, question = with_memory(tiny_model()), tokens(1, 6, seed=1)
    answers = []
    for told in (tokens(1, 20, seed=21), tokens(1, 20, seed=22)):
        reset_memory(model)
        model.generate(told, max_new_tokens=4, do_sample=False)
        answers.append(model(question).logits)
    reset_memory(model)
    answers.append(model(question).logits)
    assert all((answers[i] - answers[j]).abs().max() > 1e-3 for i in range(3) for j in range(i))


def test_a5_reads_are_independent_of_the_calls_own_writes() -> None:
    model, ids = with_memory(tiny_model(), memory_write_granularity="message_mean"), tokens(2, 8)
    set_write_segments(model, torch.zeros_like(ids))
    model(ids)
    before = get_memory(model)
    set_memory_write(model, False)
    frozen = model(ids).logits
    set_memory_write(model, True)
    set_write_segments(model, torch.arange(8).expand(2, -1) // 3)
    assert torch.equal(model(ids).logits, frozen)
    assert not states_equal(get_memory(model), before)


def test_a5_segment_ids_hold_for_one_call_and_must_fit_it() -> None:
    model, ids = with_memory(tiny_model(), memory_write_granularity="message_mean"), tokens(1, 6)
    set_write_segments(model, torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"set_write_segments got ids of shape \(1, 5\).*\(1, 6\)"):
        model(ids)
    assert not get_memory(model)
    set_write_segments(model, torch.zeros(1, 6, dtype=torch.long))
    model.generate(ids, max_new_tokens=3, do_sample=False)  # the decoding steps write token by token
    assert get_memory(model)
    with pytest.raises(TypeError, match="write_message_ids"):
        set_write_segments(model, torch.zeros(1, 6))
    with pytest.raises(ValueError, match="message_mean"):
        set_write_segments(model, None, torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="memory_write_granularity='token'"):
        set_write_segments(with_memory(tiny_model()), torch.zeros(1, 6, dtype=torch.long))


def test_failed_call_changes_no_layer() -> None:
    model, ids = with_memory(tiny_model()), tokens(1, 5)
    model(ids)
    before = get_memory(model)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    handle.remove()
    assert states_equal(get_memory(model), before)
    model(ids)
    assert not states_equal(get_memory(model), before)  # and the next call works


def test_decoder_called_by_itself() -> None:
    model, ids, mask = with_memory(tiny_model()), tokens(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model(ids, attention_mask=mask)
    expected = get_memory(model)
    reset_memory(model)
    model.model(ids, mask)  # positional
    assert states_equal(get_memory(model), expected)
    bare = tiny_model().model  # names of the full model fit a bare decoder
    with_memory(bare, random_adapter(tiny_model()))
    bare(ids, attention_mask=mask)
    assert states_equal(get_memory(bare), expected)


def test_masks_that_hide_padding_are_refused() -> None:
    model, ids = with_memory(tiny_model()), tokens(1, 5)
    with pytest.raises(ValueError, match=r"2-D attention_mask.*\(1, 1, 5, 5\)"):
        model(ids, attention_mask=torch.zeros(1, 1, 5, 5))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), expected \(1, at least 5\)"):
        model(ids, attention_mask=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    assert not get_memory(model)
    model(ids)


def test_bfloat16_model_keeps_fp32_states() -> None:
    model = with_memory(tiny_model(dtype=torch.bfloat16))
    assert model(tokens(2, 9)).logits.dtype == torch.bfloat16
    exact = with_memory(tiny_model())
    exact(tokens(2, 9))
    assert all(state.dtype == torch.float32 for state in get_memory(model).values())
    assert largest_difference(get_memory(model), get_memory(exact)) < 0.1


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_decoding_that_reorders_or_takes_back_tokens_is_refused(option: dict) -> None:
    model = with_memory(tiny_model())
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        model.generate(tokens(1, 4), max_new_tokens=2, **option)
    remove_mem_triton(model).generate(tokens(1, 4), max_new_tokens=2, **option)


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_the_stock_model(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 6)
    base, keys = model(ids).logits, list(model.state_dict())
    with_memory(model)
    assert list(model.state_dict()) == keys  # save_pretrained writes the stock model
    assert not torch.equal(model(ids).logits, base)
    remove_mem_triton(model)
    assert torch.equal(model(ids).logits, base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in vars(model) and "_mem_triton" not in vars(model)
    for call in (remove_mem_triton, reset_memory, get_memory):
        with pytest.raises(ValueError, match="has no memory"):
            call(model)


def test_copied_model_has_a_memory_of_its_own() -> None:
    model, ids = with_memory(tiny_model()), tokens(1, 6)
    model(ids)
    before, twin = get_memory(model), copy.deepcopy(model)
    twin(ids)
    assert states_equal(get_memory(model), before) and not states_equal(get_memory(twin), before)
    twin.generate(ids, max_new_tokens=2)
    remove_mem_triton(twin)
    assert states_equal(get_memory(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


def test_states_made_in_inference_mode_serve_training() -> None:
    model, ids = with_memory(tiny_model()), tokens(1, 6)
    with torch.inference_mode():
        model(ids)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_cached_keys_hold_the_correction() -> None:
    """Corrected k and v are what enters the KV cache."""
    model, ids = tiny_model(), tokens(1, 6)
    stock = model(ids, use_cache=True).past_key_values
    cache = with_memory(model, delta_heads="k,v")(ids, use_cache=True).past_key_values
    for part in ("keys", "values"):
        ours, base = getattr(cache.layers[0], part), getattr(stock.layers[0], part)
        assert torch.equal(ours[:, :, 0], base[:, :, 0])
        assert (ours[:, :, 1:] - base[:, :, 1:]).abs().amax((0, 1, 3)).min() > 1e-3


def test_apply_refuses_what_does_not_fit() -> None:
    model, adapter = tiny_model(), random_adapter(tiny_model())
    with pytest.raises(AdapterError, match=r"model\.layers\.2\.self_attn"):
        with_memory(tiny_model(layers=3), adapter)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn.memory_q_proj has no place"):
        with_memory(tiny_model(layers=1), adapter)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.\w+ has shape"):
        with_memory(tiny_model(head_dim=16), adapter)
    with pytest.raises(ConfigError, match=r"adaptor.*adapter"):
        apply_mem_triton(model, {"delta": {"adaptor": "x"}})
    with pytest.raises(ConfigError, match="session_dir is for serving engines"):
        apply_mem_triton(model, {"delta": {"adapter": adapter}, "session_dir": "x"})
    with pytest.raises(ConfigError, match=r"delta\.scope is for serving engines"):
        apply_mem_triton(model, {"delta": {"adapter": adapter, "scope": "sessions"}})
    with pytest.raises(ConfigError, match="delta is missing"):
        apply_mem_triton(model, {})
    with pytest.raises(ValueError, match="has no self_attn with q_proj"):
        with_memory(torch.nn.Linear(2, 2), adapter)
    assert not any(m._forward_hooks for m in model.modules())
    with_memory(model, adapter)
    with pytest.raises(ValueError, match="has memory already"):
        with_memory(model, adapter)
