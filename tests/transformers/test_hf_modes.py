"""Every way to run a model with memory: it writes what one call over the whole text writes, or is refused by name."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessorList, StaticCache
from transformers.generation import GenerationMixin, GenerationMode, UnbatchedClassifierFreeGuidanceLogitsProcessor

from mem_triton_transformers import (
    apply_mem_triton,
    get_memory,
    load_memory,
    remove_mem_triton,
    reset_memory,
    save_memory,
    set_memory,
    set_memory_write,
)
from tests.support.models import VOCAB, random_adapter, tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "robustness.md"
NEW = 6  # tokens that generate() adds
SERVED = {
    "greedy_search": {"do_sample": False},
    "sample": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "min_p, typical_p, epsilon_cutoff": {"do_sample": True, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 1e-4},
    "repetition_penalty, no_repeat_ngram_size, bad_words_ids": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5]],
    },
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "guidance_scale=1": {"guidance_scale": 1.0},
    "use_cache=True": {"use_cache": True},
    "num_beams=1": {"num_beams": 1},
    "cache_implementation=dynamic": {"cache_implementation": "dynamic"},
    "return_dict_in_generate": {"return_dict_in_generate": True, "output_scores": True},
}
REFUSED = {
    "beam_search": ("num_beams=3", {"num_beams": 3}),
    "beam_sample": ("num_beams=2", {"num_beams": 2, "do_sample": True}),
    "group_beam_search": ("num_beams=4", {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}),
    "constrained_beam_search": ("num_beams=2", {"num_beams": 2, "force_words_ids": [[5]]}),
    "contrastive_search": ("the mode contrastive_search", {"penalty_alpha": 0.6, "top_k": 4}),
    "dola_generation": ("dola_layers=low", {"dola_layers": "low"}),
    "assisted_generation": ("assistant_model=Qwen3ForCausalLM", {"assistant_model": "itself"}),
    "prompt_lookup_num_tokens": ("prompt_lookup_num_tokens=2", {"prompt_lookup_num_tokens": 2}),
    "assistant_early_exit": ("assistant_early_exit=1", {"assistant_early_exit": 1}),
    "use_mtp": ("use_mtp=True", {"use_mtp": True}),
    "use_cache=False": ("use_cache=False", {"use_cache": False}),
    "guidance_scale": ("guidance_scale=1.5", {"guidance_scale": 1.5}),
    "logits_processor that guides": ("logits_processor=LogitsProcessorList", {"logits_processor": "guides"}),
    "token_healing": ("token_healing=True", {"token_healing": True}),
    "custom_generate": ("custom_generate=function", {"custom_generate": lambda **kwargs: None}),
    "cache_implementation=static": ("cache_implementation=static", {"cache_implementation": "static"}),
    "cache_implementation=offloaded_static": (
        "cache_implementation=offloaded_static",
        {"cache_implementation": "offloaded_static"},
    ),
    "cache_implementation=paged": ("cache_implementation=paged", {"cache_implementation": "paged"}),
    "past_key_values that is static": ("past_key_values=StaticCache", {"past_key_values": "static"}),
}


def tokens(length: int, seed: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def with_memory() -> torch.nn.Module:
    model = tiny_model()
    model.generation_config.pad_token_id = 1
    return apply_mem_triton(model, {"delta": {"adapter": random_adapter(model)}})


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> torch.nn.Module:
    return with_memory()


def assert_written(model: torch.nn.Module, text: torch.Tensor) -> None:
    """The memory is what one plain call over ``text`` writes into an empty one."""
    written = {name: state.clone() for name, state in get_memory(model).items()}
    assert written
    reset_memory(model)
    model(text)
    for name, state in get_memory(model).items():
        assert (state - written[name]).abs().max() < 9e-6, name
    reset_memory(model)
    model(text[:, :-1])  # control: one token less is seen
    assert max((state - written[name]).abs().max() for name, state in get_memory(model).items()) > 1e-3


def test_fault27_no_mode_of_transformers_is_unknown():
    """Every mode is served or refused in the tables above; so says the document."""
    modes = {mode.value for mode in GenerationMode}
    assert modes <= {*SERVED, *REFUSED}, modes - {*SERVED, *REFUSED}
    table = dict(re.findall(r"^\| ([^|]+?) \| (served|refused) \|", DOCS.read_text(), re.MULTILINE))
    assert {name for name, says in table.items() if says == "served"} == {*SERVED}
    assert {name for name, says in table.items() if says == "refused"} == {*REFUSED}


@pytest.mark.parametrize("name", SERVED)
def test_fault27_served_modes_write_each_token_once(model, name):
    torch.manual_seed(0)
    prompt = tokens(9)
    options = dict(SERVED[name])
    out = model.generate(prompt, max_new_tokens=NEW, eos_token_id=None, **options)
    text = out.sequences if "return_dict_in_generate" in options else out
    assert text.shape[0] == options.get("num_return_sequences", 1)
    assert_written(model, text[:, :-1])  # the last token was never run


@pytest.mark.parametrize("name", REFUSED)
def test_fault27_other_modes_are_refused_before_anything_is_done(model, name, monkeypatch):
    said, options = REFUSED[name]
    options = dict(options)
    if options.get("assistant_model"):
        options["assistant_model"] = tiny_model()
    if options.get("past_key_values"):
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=32)
    if options.get("logits_processor"):
        guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)
        options["logits_processor"] = LogitsProcessorList([guide])
    for step in ("_prepare_generation_config", "_prepare_cache_for_generation", "forward"):
        monkeypatch.setattr(type(model), step, lambda *args, step=step, **kwargs: pytest.fail(f"{step} was called"))
    with pytest.raises(NotImplementedError, match=f"^{re.escape(said)} is not served with memory: "):
        model.generate(tokens(5), max_new_tokens=NEW, **options)
    assert not get_memory(model)


def test_fault27_options_count_wherever_they_stand(model):
    """As an argument, in generation_config, or among the model's defaults; the first of these that says something."""
    asked = GenerationConfig(num_beams=2)
    with pytest.raises(NotImplementedError, match="num_beams=2"):
        model.generate(tokens(5), asked, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        model.generate(tokens(5), generation_config=GenerationConfig(use_cache=False), max_new_tokens=2)
    model.generate(tokens(5), asked, num_beams=1, max_new_tokens=2)
    model.generation_config.use_cache = False
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        model.generate(tokens(5), max_new_tokens=2)
    model.generate(tokens(5), max_new_tokens=2, use_cache=True)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_fault27_continuous_batching_is_refused_at_the_call(model, name):
    with pytest.raises(NotImplementedError, match=rf"^{name}\(\) is not served with memory: .* share a memory"):
        getattr(model, name)([[3, 4, 5]])
    remove_mem_triton(model)
    assert name not in vars(model)


def test_fault27_a_loop_of_plain_calls_with_a_cache_is_served(model):
    text = tokens(9)
    cache, given = DynamicCache(), None
    for piece in text.split((4, 1, 3, 1), dim=1):  # with a cache of the caller's, and with the one that a call made
        model(piece, past_key_values=cache)
    assert_written(model, text)
    reset_memory(model)
    for piece in text.split((4, 1, 3, 1), dim=1):
        given = model(piece, past_key_values=given, use_cache=True).past_key_values
    assert_written(model, text)


def test_fault27_a_static_cache_of_the_callers_is_served(model):
    text = tokens(9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    for piece in text.split((5, 1, 3), dim=1):
        model(piece, past_key_values=cache)
    assert_written(model, text)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["input_ids", "inputs_embeds"])
def test_fault27_plain_calls_that_repeat_the_text_are_refused(model, kind, use_cache):
    """The usual loop without a cache: each call holds all that was said before."""
    text = tokens(9, batch=2)
    given = text if kind == "input_ids" else model.get_input_embeddings()(text)
    model(**{kind: given[:, :6]}, use_cache=use_cache)
    before = {name: state.clone() for name, state in get_memory(model).items()}
    with pytest.raises(ValueError, match=r"runs the last one's 6 tokens again.*past_key_values.*reset_memory"):
        model(**{kind: given[:, :7]}, use_cache=use_cache)
    assert all(torch.equal(before[name], state) for name, state in get_memory(model).items())
    set_memory_write(model, False)
    model(**{kind: given[:, :7]}, use_cache=use_cache)  # reading repeats nothing
    reset_memory(model)
    set_memory_write(model, True)
    model(**{kind: given[:, :7]}, use_cache=use_cache)
    assert_written(model, text[:, :7])


def test_fault27_a_loop_that_generate_of_the_class_runs_is_refused_too(model):
    with pytest.raises(ValueError, match="runs the last one's 5 tokens again"):
        GenerationMixin.generate(model, tokens(5), max_new_tokens=3, use_cache=False, eos_token_id=None)


def test_fault27_new_contexts_are_served_though_they_begin_alike(model):
    """A memory outlives contexts: a chat that is sent again is another one, and so is the same prompt."""
    prompt = tokens(6)
    answer = model.generate(prompt, max_new_tokens=3, eos_token_id=None)
    model.generate(torch.cat([answer, tokens(4, seed=4)], 1), max_new_tokens=3, eos_token_id=None)
    model(prompt)
    model(prompt)  # told twice
    model(tokens(8, seed=5))
    model(tokens(9, seed=6))


def test_fault27_a_cropped_cache_is_refused_until_memory_is_taken_back_too(model):
    text, other = tokens(9), tokens(4, seed=8)
    cache = DynamicCache()
    model(text[:, :5], past_key_values=cache)
    kept = {name: state.clone() for name, state in get_memory(model).items()}
    model(text[:, 5:], past_key_values=cache)
    cache.crop(-4)
    with pytest.raises(ValueError, match="the cache was cropped from 9 to 5 tokens"):
        model(other, past_key_values=cache)
    with pytest.raises(ValueError, match="the cache was cropped from 9 to 5 tokens"):
        model.generate(torch.cat([text[:, :5], other], 1), past_key_values=cache, max_new_tokens=2)
    set_memory_write(model, False)
    model(other[:, :1], past_key_values=cache)  # reading takes nothing back
    cache.crop(-1)
    set_memory_write(model, True)
    set_memory(model, kept)
    model(other, past_key_values=cache)
    assert_written(model, torch.cat([text[:, :5], other], 1))


def test_fault27_generate_goes_on_with_a_cache(model):
    """The second call gets the whole text and the first one's cache; only what is new is run."""
    cache = DynamicCache()
    first = model.generate(tokens(6), past_key_values=cache, max_new_tokens=3, eos_token_id=None)
    longer = torch.cat([first, tokens(4, seed=4)], 1)
    text = model.generate(longer, past_key_values=cache, max_new_tokens=3, eos_token_id=None)
    assert_written(model, text[:, :-1])


def test_fault27_a_copied_cache_is_a_context_of_its_own(model):
    cache = DynamicCache()
    model(tokens(6), past_key_values=cache)
    twin, kept = copy.deepcopy(cache), get_memory(model)
    model(tokens(3, seed=4), past_key_values=cache)
    set_memory(model, kept)
    model(tokens(2, seed=5), past_key_values=twin)
    assert_written(model, torch.cat([tokens(6), tokens(2, seed=5)], 1))


def test_fault27_a_loaded_memory_begins_a_context(model, tmp_path):
    text = tokens(7)
    model(text[:, :4])
    save_memory(model, tmp_path / "m.safetensors")
    load_memory(model, tmp_path / "m.safetensors")
    model(text)  # told again, by a caller who said so
    assert not any(state.isnan().any() for state in get_memory(model).values())


def test_fault_versions_a_model_from_a_folder_with_use_cache_off(tmp_path):
    """A checkpoint that was saved while it trained has use_cache off; generate() has a default of its own."""
    model = tiny_model()
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    apply_mem_triton(model, {"delta": {"adapter": random_adapter(model)}})
    text = model.generate(tokens(6), max_new_tokens=4, eos_token_id=None)
    assert_written(model, text[:, :-1])
