"""Lists every change that this integration makes to vLLM: what, why, what vLLM offers, and when it can go."""

from __future__ import annotations

from mem_triton.patches import EnginePatch

PATCHES: tuple[EnginePatch, ...] = (
    EnginePatch(
        target="vllm.v1.engine.async_llm.AsyncLLM.__init__, vllm.v1.engine.llm_engine.LLMEngine.__init__",
        kind="patch",
        sites=(
            "engines.install: stock.__init__",
            "engines.install: undo.callback(setattr)",
            "engines._checking_init.__init__: self.*",
        ),
        what="The two constructors are wrapped. An engine whose configuration has a mem_triton section gets, once it "
        "is built, a subclass of its class that overrides how requests come in and answers go out, collective_rpc and "
        "sleep. All others stay stock.",
        why="A request's memory is opened before vLLM schedules it, and committed before its last output is returned.",
        upstream="vLLM's plugin groups offer no class for the engine's front end; vllm.endpoint_plugins adds routes "
        "only.",
        until="vLLM lets a plugin name the engine class, or calls a plugin at the start and at the end of a request.",
    ),
    EnginePatch(
        target="vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys",
        kind="patch",
        sites=(
            "block_keys.install: kv_cache_utils.generate_block_hash_extra_keys",
            "block_keys.install: undo.callback(setattr)",
        ),
        what="The function is wrapped in the engine-core process: a block's hash covers the references that its "
        "tokens see.",
        why="Keys and values after the first layer depend on the memory that was read; without it requests with other "
        "memory find them in the prefix cache, and answer wrongly.",
        upstream="cache_salt covers whole requests, and is what sessions use. References change every 64 tokens, and "
        "no plugin can add a key per block.",
        until="A request may carry a key per block or per range of tokens.",
    ),
    EnginePatch(
        target="vllm.v1.core.sched.scheduler.Scheduler.add_request",
        kind="patch",
        sites=("places.install: Scheduler.add_request", "places.install: undo.callback(setattr)"),
        what="The method is wrapped in the engine-core process: a request that continues an answer goes to the front "
        "of the queue.",
        why="An answer whose references change runs as several engine requests; newcomers would overtake it.",
        upstream="Queues go by arrival or by priority, and a continuation has arrived last. Streaming inputs keep a "
        "place between two inputs of one request, whose memory the runner is told of once.",
        until="A request may change what travels with it between two of its steps.",
    ),
    EnginePatch(
        target="a scheduler with answers in pieces: _free_blocks, schedule, reset_prefix_cache, max_num_active_reqs",
        kind="object",
        sites=(
            "places.Places.__init__: scheduler.*",
            "places.Places.schedule: self._scheduler.max_num_active_reqs",
            "places.Places.free_blocks: self._scheduler.requests[request.request_id]",
            "places.Places.to_front: request.arrival_time",
            "places._with_places.add_request: setattr(scheduler, _MARK)",
        ),
        what="Between two pieces of an answer its place in the batch and its KV blocks are reserved, two seconds at "
        "most.",
        why="See above: the next piece finds the place that the last one had.",
        upstream="A place in the batch and KV blocks belong to one engine request.",
        until="See above.",
    ),
    EnginePatch(
        target="vllm.v1.worker.gpu_model_runner.GPUModelRunner.get_kv_cache_spec, ._update_states",
        kind="patch",
        sites=("v1_runner.prepare: GPUModelRunner.*", "v1_runner.prepare: setattr(GPUModelRunner, _MARK)"),
        what="Two methods of Model Runner V1 are wrapped, in workers that loaded a model with memory: the first "
        "attaches memory after LoRA has wrapped the layers, the second says which requests a step has, and in which "
        "rows.",
        why="Workers of a CPU build without Triton run V1. Memory has to know a step's requests and their rows.",
        upstream="V1 has no extension point in the worker. Its successor V2 has one, ModelState, used on GPUs.",
        until="vLLM's CPU worker runs Model Runner V2 without Triton.",
    ),
    EnginePatch(
        target="vllm.entrypoints.launchers.app.init_entrypoints_middleware (request headers)",
        kind="patch",
        sites=(
            "callers.install: setattr(import_module(APP), ADDS_MIDDLEWARE)",
            "callers.install.adds_middleware: app.add_middleware",
        ),
        what="The function is wrapped, only where tenants are configured: the server gets one middleware more, which "
        "keeps a request's headers for the code that answers it.",
        why="The API key says which tenant a request speaks for.",
        upstream="Handlers do not pass headers to the engine. --middleware takes a class by name, from the user alone; "
        "vllm.endpoint_plugins gets the app, but only where VLLM_PLUGINS names the plugin.",
        until="A plugin that is installed may add middleware, or generate is told who calls.",
    ),
    EnginePatch(
        target="vllm.entrypoints.launchers.app.init_entrypoints_middleware (misplaced fields)",
        kind="patch",
        sites=(
            "http_fields.install: app.init_entrypoints_middleware",
            "http_fields._with_refusals.init_entrypoints_middleware: app.user_middleware.append",
        ),
        what="The function is wrapped: the server gets two middlewares more, behind authentication. One answers "
        "memory fields that vLLM would drop with HTTP 400 and the place where they belong; the other the names of chat "
        "models on routes that do not serve them.",
        why="A field that is silently dropped is an answer without the memory that was asked for.",
        upstream="vLLM ignores fields that it does not know. --middleware takes a class by name, from the user alone; "
        "vllm.endpoint_plugins gets the app, but only where VLLM_PLUGINS names the plugin.",
        until="A plugin that is installed may add middleware.",
    ),
    EnginePatch(
        target="vllm.entrypoints.launchers.run_batch.run_request",
        kind="patch",
        sites=("http_fields.install: run_batch.run_request",),
        what="The function is wrapped: a line of `vllm run-batch` with a misplaced memory field is refused, as over "
        "HTTP.",
        why="See above; run-batch has no HTTP server.",
        upstream="run-batch has no hook for a line of its file.",
        until="run-batch refuses fields that it does not know.",
    ),
    EnginePatch(
        target="vllm.entrypoints.openai.models.serving.OpenAIServingModels.load_lora_adapter",
        kind="patch",
        sites=("lora_routes.install: OpenAIServingModels.load_lora_adapter",),
        what="The method is wrapped: where the engine raises RetryableRequestError, the answer is HTTP 503 with its "
        "reason.",
        why="A load in the place of an adapter waits for the requests that it answers, and gives up after five "
        "minutes: clients may try again, and HTTP 500 says that they may not.",
        upstream="Whatever add_lora raises is HTTP 500, and its text alone is kept.",
        until="vLLM answers the engine's own error, as its other routes do.",
    ),
    EnginePatch(
        target="attn_backend and the class of impl of attention layers",
        kind="object",
        sites=("backend.add_to: attention.attn_backend", "backend.add_to: impl.__class__"),
        what="In a worker whose configuration has a bank, each attention layer's backend and implementation get "
        "subclasses of the classes that vLLM has chosen. Their methods mem_connect and mem_set_layout say what is "
        "read and how the KV cache lies: vLLM builds these objects before either is known. Steps in which no row "
        "reads memory call the stock methods and nothing else.",
        why="Rows that read memory attend to it and to their context in one softmax.",
        upstream="A backend of one's own replaces vLLM's choice instead of adding to it, and the CPU platform takes "
        "none.",
        until="A layer takes keys and values besides its context, or a plugin may wrap the chosen backend.",
    ),
    EnginePatch(
        target="vllm.v1.attention.backends.flash_attn.flash_attn_varlen_func",
        kind="patch",
        sites=("flash_lse.install: flash_attn.flash_attn_varlen_func",),
        what="The name is wrapped in workers with a bank and FlashAttention: while a layer with memory runs, its "
        "log-sum-exp is asked for and kept. The same kernel is launched.",
        why="Memory is merged into the engine's own attention by log-sum-exp.",
        upstream="The implementation drops the log-sum-exp, except under decode context parallelism.",
        until="AttentionImpl.forward can hand on its log-sum-exp.",
    ),
    EnginePatch(
        target="qkv_proj and o_proj of the model's attention modules",
        kind="object",
        sites=("attach.attach: module.qkv_proj", "attach.attach: module.o_proj"),
        what="The two modules are replaced by wrappers that call them and add the corrections of δ-mem.",
        why="δ-mem corrects q, k and v before norm and RoPE, and the output after the projection.",
        upstream="Modules have forward hooks, which torch.compile handles less well than modules. There is no hook of "
        "vLLM's own.",
        until="vLLM offers a place for per-token corrections around projections.",
    ),
    EnginePatch(
        target="qkv_proj, q_norm, k_norm and rotary_emb of Qwen3, Qwen2 and Llama attention, on GPUs",
        kind="object",
        sites=("fused_inputs.install: module.*",),
        what="One kernel does projection, correction, norm and RoPE; the norms and the rotary embedding pass on what "
        "they get.",
        why="A decode step of δ-mem costs launches, not bytes. Its launches take the place of the model's own.",
        upstream="A compiler pass fuses q/k norm with RoPE, and leaves no place for a correction before them.",
        until="The pass takes an addition before the norm.",
    ),
    EnginePatch(
        target="weight and bias of an unquantised qkv_proj, on GPUs",
        kind="object",
        sites=("folding.fold: base.weight.data", "folding.fold: base.bias.data"),
        what="Both become views of a larger matrix, which holds the rows of δ-mem's projections, too.",
        why="One matmul gives q, k, v and δ-mem's projections.",
        upstream="vLLM merges its own projections when a model is defined, not after it is loaded.",
        until="A plugin may add rows to a merged projection.",
    ),
    EnginePatch(
        target="attention metadata: mem_triton",
        kind="object",
        sites=("backend.BuilderWithMemory.*",),
        what="A step's metadata say where its rows' contexts lie, in the form that memory attention reads.",
        why="The stock builder's own fields differ from backend to backend.",
        upstream="CommonAttentionMetadata, which all builders get, does not reach the implementations.",
        until="It does.",
    ),
    EnginePatch(
        target="compilation_config.static_forward_context",
        kind="object",
        sites=("state_cache.DeltaStateCache.__init__: layers.*",),
        what="The layer that stores states is entered before the attention layers.",
        why="vLLM takes a group's block manager from the group's first layer, and it has to be the one that knows "
        "that a state is not there before its step is over.",
        upstream="Layers register themselves there as they are built; the order is theirs.",
        until="Block managers are chosen by all specs of a group.",
    ),
    EnginePatch(
        target="compilation_config.splitting_ops",
        kind="object",
        sites=("attach.split_graphs_at_ops: splitting_ops",),
        what="The operators of δ-mem are added to the list.",
        why="They look at the step's metadata, so piecewise CUDA graphs have to be cut at them.",
        upstream="The list is an option of the user's; models of vLLM are in its default.",
        until="An operator may say of itself that graphs are cut at it.",
    ),
    EnginePatch(
        target="the loaded model: mem_triton, mem_triton_pending",
        kind="object",
        sites=(
            "v1_runner.prepare: model.mem_triton_pending",
            "held.give: model.mem_triton",
        ),
        what="The worker's memory is an attribute of the model.",
        why="Worker methods and runners find it there; they have the model and nothing else in common.",
        upstream="A worker has no place for a plugin's objects.",
        until="It has one.",
    ),
    EnginePatch(
        target="model.get_model_state_cls",
        kind="extension",
        sites=("v2_runner.prepare: model.get_model_state_cls",),
        what="The model names a ModelState class of ours, derived from the one that vLLM would have chosen.",
        why="Memory has to know a step's requests and their rows.",
        upstream="This is Model Runner V2's extension point; it is not documented as stable.",
        until="No need.",
    ),
    EnginePatch(
        target="vllm.model_executor.model_loader.register_model_loader",
        kind="extension",
        sites=("__init__._register: register_model_loader",),
        what="The load format mem_triton, which loads weights by another format and then attaches memory.",
        why="It runs in every worker after the weights are there and before device memory is profiled.",
        upstream="Documented extension point.",
        until="No need.",
    ),
    EnginePatch(
        target="vllm.v1.kv_cache_spec_registry",
        kind="extension",
        sites=("kv_spec: KVCacheSpecRegistry._ensure_registered", "kv_spec: register_kv_cache_spec"),
        what="The spec of δ-mem's states and its block manager are registered, after vLLM's own.",
        why="States lie beside the KV blocks whose tokens made them.",
        upstream="The registry is an extension point. It registers vLLM's own specs only while it is empty, so the "
        "private _ensure_registered is called first.",
        until="The registry registers vLLM's own specs in any case: the private call can go.",
    ),
    EnginePatch(
        target="vllm.v1.worker.worker_base.WorkerBase",
        kind="extension",
        sites=("service.install: setattr(WorkerBase, BARRIER)", "service.install: setattr(WorkerBase, CALL)"),
        what="Two methods are added: mem_triton_barrier, which does nothing, and mem_triton_call, which answers a "
        "front end's call.",
        why="The first one's answer says that a worker has begun all steps that were planned before: the pages of a "
        "request that was aborted may be filled anew. The second runs on all ranks between the same two steps: pools "
        "of rows are written by the model's own layers, whose collectives must not meet a step's.",
        upstream="vLLM's guide for plugins has them add their methods to WorkerBase.",
        until="No need.",
    ),
    EnginePatch(
        target="vllm.model_executor.warmup.jit_warmup.JitWarmupRegistry",
        kind="extension",
        sites=("warmup.register: JitWarmupRegistry.register",),
        what="Memory's kernels are compiled in vLLM's own warm-up.",
        why="No request waits for a compiler, and CUDA graphs can be captured.",
        upstream="Extension point of vLLM's.",
        until="No need.",
    ),
    EnginePatch(
        target="vllm.endpoint_plugins: POST /v1/chat/completions, GET /v1/models",
        kind="extension",
        sites=("endpoints.ChatModels.init_state: state.mem_triton_chats*",),
        what="Where VLLM_PLUGINS names mem_triton, two routes take the place of vLLM's own. A chat request to a memory "
        "system's chat model is answered by it, and the list of models names it. All others are handed to vLLM's "
        "handlers as they came.",
        why="MeMo's executive and memory model are one model to users.",
        upstream="This is the extension point. Its routes replace those of the same path and method by contract.",
        until="It stays.",
    ),
    EnginePatch(
        target="prompts, SamplingParams, RequestOutput and CompletionOutput of one request",
        kind="request",
        sites=(
            "front_end.VLLMFrontEnd.carry: *",
            "front_end.with_tokens: prompt.prompt_token_ids",
            "front_end._salt: prompt.cache_salt",
            "front_end.add_report: output.kv_transfer_params",
            "continuation.ContinuedAnswer._merged: answer.*",
            "continuation.ContinuedAnswer._spell: answer.logprobs",
            "continuation.ContinuedAnswer.take: merged.finished",
            "front_end.ended_by_error: answer.finish_reason",
        ),
        what="Copies of a request's parameters get extra_args for the workers, its prompt a cache_salt; answers in "
        "several pieces are put together, and the last output says in kv_transfer_params what was read.",
        why="All that memory needs travels with the request; the report has no other field in OpenAI's protocol.",
        upstream="extra_args and cache_salt are public; kv_transfer_params is meant for KV connectors.",
        until="Outputs have a field for plugins.",
    ),
    EnginePatch(
        target="the rotary embeddings' cos_sin_cache, of a model converted from M+",
        kind="object",
        sites=("loader.use_frequencies: *",),
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
    "_LOAD_FORMAT_TO_MODEL_LOADER": "the table of load formats is looked at, so that registering twice is harmless",
    "_api_process_count": "the number of API servers: memory needs one front end",
    "_ensure_registered": "vLLM registers its own KV cache specs before ours",
    "_free_request_blocks": "a piece of an answer keeps its KV blocks until the next one comes",
    "_q_scale": "the layer's scale of queries that were quantised for an 8-bit KV cache",
    "_verify_tokens": "texts of tokens that are parts of a character, for the log-probabilities of an answer in pieces",
}
"""Private name of vLLM that is read or called -> what for."""
