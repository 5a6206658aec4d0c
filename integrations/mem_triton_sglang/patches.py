"""Lists every change that this integration makes to SGLang: what, why, what SGLang offers, and when it can go."""

from __future__ import annotations

from mem_triton.patches import EnginePatch

_REGISTRY = ("hooks.register_hooks: HookRegistry.register",)
_SEEN = (
    "SGLang's hook registry for plugins. It only logs a hook that it cannot apply, so our start-up check looks for it."
)

PATCHES: tuple[EnginePatch, ...] = (
    EnginePatch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.__init__",
        kind="hook",
        sites=(*_REGISTRY, "engines.after_init: manager.__class__"),
        what="After the constructor the manager gets a subclass of its class, which overrides generate_request, "
        "abort_request and the methods that change weights, and calls private methods of it (listed below).",
        why="A request's memory is opened before the scheduler has it, and committed before its last output is "
        "returned.",
        upstream=_SEEN + " There is no way to name the manager's class, and no public way to answer a batch or to "
        "end a request that the scheduler never had.",
        until="SGLang takes a TokenizerManager class from a plugin.",
    ),
    EnginePatch(
        target="sglang.srt.utils.weight_versions.build_endpoint_weight_version_metadata",
        kind="hook",
        sites=_REGISTRY,
        what="The metadata of an OpenAI answer gets what the request read from memory.",
        why="OpenAI's protocol has no other field for it.",
        upstream=_SEEN + " The metadata is made of meta_info by this function alone.",
        until="Fields of meta_info reach OpenAI's answers.",
    ),
    EnginePatch(
        target="sglang.srt.managers.schedule_batch.Req.__init__",
        kind="hook",
        sites=_REGISTRY,
        what="A request with memory fields that the front end has not answered is ended with an error. One that is a "
        "piece of an answer is remembered, for its place in the queue.",
        why="It came in past the front end, and would be answered without its memory.",
        upstream=_SEEN,
        until="Every way in goes through one front end, or custom_params can be checked where they come in.",
    ),
    EnginePatch(
        target="sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority",
        kind="hook",
        sites=_REGISTRY,
        what="Once the queue is sorted, requests that continue an answer go to its front; where requests have "
        "priorities, to the front of their own.",
        why="An answer whose references change runs as several engine requests; newcomers would overtake it.",
        upstream=_SEEN + " A priority is the user's to give, and needs --enable-priority-scheduling.",
        until="A request may change what travels with it between two of its steps.",
    ),
    EnginePatch(
        target="sglang.srt.managers.scheduler.Scheduler.get_num_allocatable_reqs",
        kind="hook",
        sites=_REGISTRY,
        what="Between two pieces of an answer its place in the batch is reserved, for 256 passes of the scheduler at "
        "most.",
        why="See above: the next piece finds the place that the last one had.",
        upstream=_SEEN + " A place in the batch belongs to one request.",
        until="See above.",
    ),
    EnginePatch(
        target="sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
        kind="hook",
        sites=(*_REGISTRY, "places.before_pass: batch.batch_is_full"),
        what="Passes are counted while places are reserved, and a batch that was full because of them is looked at "
        "again.",
        why="See above. SGLang looks again only when a request has left.",
        upstream=_SEEN,
        until="See above.",
    ),
    EnginePatch(
        target="sglang.srt.mem_cache.radix_cache.RadixKey.__init__",
        kind="hook",
        sites=(*_REGISTRY, "radix_keys.after_init: key.*"),
        what="A key whose extra_key says which references its tokens see gets token ids that differ where those "
        "differ.",
        why="Keys and values after the first layer depend on the memory that was read; without it requests with other "
        "memory find them in the radix cache, and answer wrongly.",
        upstream=_SEEN + " extra_key parts whole requests; references change every 64 tokens.",
        until="A request may carry a key per page or per range of tokens.",
    ),
    EnginePatch(
        target="sglang.srt.model_executor.model_runner.ModelRunner.initialize",
        kind="hook",
        sites=(*_REGISTRY, "held.give: holder.mem_triton"),
        what="Memory is attached to the model, as its attribute mem_triton, after weights and LoRA are there.",
        why="Device memory for pages and states has to be taken before the KV cache is sized.",
        upstream=_SEEN,
        until="SGLang calls plugins between loading and sizing.",
    ),
    EnginePatch(
        target="sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        kind="hook",
        sites=_REGISTRY,
        what="A token takes the bytes of its share of a state, too.",
        why="The states are allocated beside the KV cache, and have to be accounted for.",
        upstream=_SEEN + " The method is private.",
        until="A plugin may add bytes to a token.",
    ),
    EnginePatch(
        target="sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool",
        kind="hook",
        sites=(*_REGISTRY, "held.give: holder.mem_triton"),
        what="States are allocated for as many pages as the KV cache has, and the channel to the front end is opened.",
        why="Only now it is known how many pages there are.",
        upstream=_SEEN,
        until="A plugin may allocate with the pool.",
    ),
    EnginePatch(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        kind="hook",
        sites=_REGISTRY,
        what="Before each forward pass the rows of its requests are written into memory's tables, on its stream.",
        why="Kernels have to know whose state and which pages each row reads.",
        upstream=_SEEN,
        until="A batch carries request ids to the attention backend.",
    ),
    EnginePatch(
        target="sglang.srt.mem_cache.memory_pool.ReqToTokenPool.free",
        kind="hook",
        sites=_REGISTRY,
        what="A request leaves memory's tables before its row is given back.",
        why="However a request ends, finished, aborted or retracted, its row comes by here while its KV is still "
        "there.",
        upstream=_SEEN,
        until="SGLang tells plugins when a request leaves a batch for good.",
    ),
    EnginePatch(
        target="sglang.srt.plugins.hook_registry.HookRegistry._hooks",
        kind="patch",
        sites=("hooks._forget: HookRegistry._hooks*",),
        what="Where one hook cannot be had, those that were handed over before it are taken out again.",
        why="All hooks are in place or none: half of a memory answers wrongly.",
        upstream="The registry has no method to take a hook back.",
        until="It has one.",
    ),
    EnginePatch(
        target="the attention backend that SGLang would have chosen",
        kind="object",
        sites=("backend.create: backend.*",),
        what="The stock backend is built and gets a class that is ours and the stock one's at once.",
        why="Whatever SGLang asks of its backend is answered as before, and steps with memory are computed by ours.",
        upstream="A backend is registered by name (below); nothing wraps the one that was chosen.",
        until="SGLang's attention takes a second, additional set of keys and values.",
    ),
    EnginePatch(
        target="qkv_proj and o_proj of the model's attention modules",
        kind="hook",
        sites=(
            "attach.attach: module.qkv_proj.register_forward_hook",
            "attach.attach: module.o_proj.register_forward_hook",
            "attach._prepare_in_one_launch: qkv_proj.register_forward_hook",
        ),
        what="Forward hooks of torch add the corrections of δ-mem to what the projections give.",
        why="δ-mem corrects q, k and v before norm and RoPE, and the output after the projection. The modules, their "
        "parameters and names stay as they are.",
        upstream="Forward hooks are public in torch; SGLang also has --forward-hooks for hooks by name.",
        until="No need.",
    ),
    EnginePatch(
        target="qkv_proj.forward, weight and bias of unquantised projections, on GPUs",
        kind="object",
        sites=(
            "attach._prepare_in_one_launch: qkv_proj.forward",
            "folding.fold: base.weight.data",
            "folding.fold: base.bias.data",
        ),
        what="The module's forward is replaced by one that gives δ-mem's projections in the same matmul; weight and "
        "bias become views of a larger matrix.",
        why="A decode step of δ-mem costs launches, not bytes.",
        upstream="SGLang merges its own projections when a model is defined, not after it is loaded.",
        until="A plugin may add rows to a merged projection.",
    ),
    EnginePatch(
        target="sglang.srt.entrypoints.http_server.app.user_middleware",
        kind="object",
        sites=("http_fields.install: middleware.append",),
        what="The server gets two middlewares more, behind authentication. One answers memory fields that SGLang would "
        "drop with HTTP 400 and the place where they belong; the other lists chat models of memory systems with the "
        "server's own, and refuses their names on routes that do not serve them; where there are any, the plain names "
        "of LoRA adapters, too.",
        why="A field that is silently dropped is an answer without the memory that was asked for; SGLang takes "
        "a model's name that it does not know for the base model's, and the plain name of an adapter, which it lists.",
        upstream="SGLang ignores fields that it does not know, and has no option for middleware.",
        until="A plugin may add middleware.",
    ),
    EnginePatch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.serving_chat_class",
        kind="extension",
        sites=("engines.after_init: manager.__class__",),
        what="Where a memory system has a chat model (MeMo), our manager names a subclass of SGLang's handler of chat "
        "requests. A request to the chat model is answered by it; all others are SGLang's handler's. One that names a "
        "LoRA adapter as the server lists it gets there under base:adapter.",
        why="MeMo's executive and memory model are one model to users.",
        upstream="The property is there for subclasses to name another class.",
        until="It stays.",
    ),
    EnginePatch(
        target="sglang.srt.arg_groups.resolution_hooks",
        kind="extension",
        sites=("configuration.register_resolution: register_resolution_hook",),
        what="Three steps of the resolution of arguments check the configuration and set defaults (page size, running "
        "requests, no graphs for prefill with δ-mem).",
        why="What cannot work is refused before any process starts.",
        upstream="Extension point of SGLang's. To take a step out again we remove it from its private list _HOOKS.",
        until="No need.",
    ),
    EnginePatch(
        target="sglang.srt.layers.attention.attention_registry.register_attention_backend",
        kind="extension",
        sites=(
            "__init__._register: register_attention_backend",
            "__init__._register: add_attention_backend_choices",
            "__init__._register: add_deterministic_attention_backend_choices",
        ),
        what="The name mem_triton is registered and added to what --attention-backend takes.",
        why="It is the option that asks for memory.",
        upstream="Extension point of SGLang's.",
        until="No need.",
    ),
    EnginePatch(
        target="GenerateReqInput of one request",
        kind="request",
        sites=(
            "tokenizer_manager.TokenizerManagerWithMemory._begin: obj.*",
            "tokenizer_manager.TokenizerManagerWithMemory._tokenized: obj.*",
            "tokenizer_manager.TokenizerManagerWithMemory._generate: obj.*",
            "tokenizer_manager.TokenizerManagerWithMemory._open: obj.*",
        ),
        what="Its custom_params get what workers need, its extra_key what its KV depends on; its text becomes tokens.",
        why="All that memory needs travels with the request.",
        upstream="Both fields are public. Messages between processes allow scalars and flat lists in custom_params, "
        "so ours is one string.",
        until="No need.",
    ),
    EnginePatch(
        target="the rotary embeddings' cos_sin_cache, of a model converted from M+",
        kind="object",
        sites=("worker.use_frequencies: *",),
        what="The table is computed from the frequencies that the model's configuration lists.",
        why="The authors of M+ run it with frequencies that are rounded to bfloat16.",
        upstream="No type of RoPE takes a list of frequencies.",
        until="A configuration may list frequencies.",
    ),
    EnginePatch(
        target="the qkv_proj of each decoder layer, where a store of M+ is served",
        kind="hook",
        sites=("own_layers.LlamaLayers.watch: *",),
        what="A forward pre-hook of torch hands the layer's normed rows on; calls of our own are left out.",
        why="Which long-term rows a prompt reads in a layer depends on the layer's own input.",
        upstream="Forward hooks are public in torch.",
        until="No need.",
    ),
)

PRIVATE: dict[str, str] = {
    "_HOOKS": "steps of the resolution of arguments are taken out again",
    "_collect_batch_responses": "answers of a batch are put together as SGLang does it",
    "_handle_abort_req": "a request that the scheduler never had is ended as SGLang ends an aborted one",
    "_hooks": "hooks that were handed over are taken out again",
    "_init_req_state": "as _handle_abort_req",
    "_patched": "the start-up check looks which hooks were applied",
    "_stream_batch_responses": "streams of a batch are put together as SGLang does it",
    "_tokenize_texts": "references are found for a prompt's tokens before the request is SGLang's",
    "_validate_one_request": "a prompt that is too long is refused before its references are found",
    "_wait_one_response": "as _handle_abort_req",
}
"""Private name of SGLang that is read or called -> what for."""
