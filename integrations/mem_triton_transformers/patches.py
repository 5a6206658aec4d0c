"""Lists every change that this integration makes to a transformers model: what, why, and when it can go."""

from __future__ import annotations

from mem_triton.patches import EnginePatch

PATCHES: tuple[EnginePatch, ...] = (
    EnginePatch(
        target="model.generate, model.generate_batch and the other methods that begin continuous batching",
        kind="object",
        sites=(
            "attach.attach: model.generate",
            "attach.attach: setattr(model, name)",
            "attach.attach: partial(setattr)",
        ),
        what="The methods of this one model are replaced: generate refuses what would not write each token once, and "
        "begins a new context; the others are refused. remove_mem_triton puts them back.",
        why="Beam search, assisted generation and packed batches write tokens twice, or take back what was written.",
        upstream="generate() has no hook that sees its arguments.",
        until="A model may declare which modes of generation it serves.",
    ),
    EnginePatch(
        target="the model, and a decoder in it that may be called by itself",
        kind="hook",
        sites=("call.ModelCall.attach: module.*",),
        what="Forward hooks of torch take the caller's attention mask, and commit new states when the call has ended "
        "well.",
        why="A layer sees a mask whose meaning depends on the attention implementation; a call that fails halfway "
        "must leave every state as it was.",
        upstream="Forward hooks are public in torch.",
        until="No need.",
    ),
    EnginePatch(
        target="the attention modules and their q_proj, k_proj, v_proj and o_proj",
        kind="hook",
        sites=("layer.DeltaLayer.attach: *",),
        what="Forward hooks of torch read and write the state, and add the corrections of δ-mem.",
        why="δ-mem corrects q, k and v before norm and RoPE, and the output after the projection.",
        upstream="Forward hooks are public in torch.",
        until="No need.",
    ),
    EnginePatch(
        target="the attention modules, while a text is encoded for a bank",
        kind="hook",
        sites=("encode._Recorder.__enter__: module.register_forward_hook",),
        what="Forward hooks of torch take keys and queries behind q/k norm, before RoPE.",
        why="A bank stores keys without rotation.",
        upstream="Forward hooks are public in torch.",
        until="No need.",
    ),
    EnginePatch(
        target="the decoder and its attention modules, while a pool of M+ is read",
        kind="hook",
        sites=("long_term.choosing: *",),
        what="Forward pre-hooks of torch see the prompt's mask, and each layer's normed rows before its attention, "
        "which then reads the long-term rows that these choose; they are gone with the context.",
        why="Which rows a layer reads depends on its own input.",
        upstream="Forward hooks are public in torch.",
        until="No need.",
    ),
    EnginePatch(
        target="the decoder's rotary_emb.inv_freq, of a model converted from M+",
        kind="object",
        sites=("long_term.use_frequencies: *", "long_term.stock_frequencies: *"),
        what="The buffer holds the frequencies that the model's configuration lists; remove_mem_triton puts the stock "
        "ones back.",
        why="The authors of M+ run it with frequencies that are rounded to bfloat16.",
        upstream="No type of RoPE in transformers takes a list of frequencies.",
        until="A configuration may list frequencies.",
    ),
    EnginePatch(
        target="the linears that have an adapter for writing, while a text is written into a pool",
        kind="hook",
        sites=("pools._writing_adapter: model.get_submodule(name).register_forward_hook",),
        what="Forward hooks of torch add the product of two thin matrices; they are gone when the write is over, "
        "however it ends.",
        why="MemoryLLM writes with other weights than it reads with, and the base weights are there once.",
        upstream="Forward hooks are public in torch.",
        until="No need.",
    ),
    EnginePatch(
        target="model._mem_triton_pools",
        kind="object",
        sites=("pools.attach_pools: setattr(model, POOLS)", "pools.detach_pools: delattr(model, POOLS)"),
        what="The model carries the store of its pools in a plain attribute; remove_mem_triton takes it off.",
        why="The memory belongs to the model object.",
        upstream="None; attributes of modules are free.",
        until="No need.",
    ),
    EnginePatch(
        target="the attention modules' __dict__, while memory is read",
        kind="object",
        sites=("explicit.read_memory: attention.__dict__[READING]",),
        what="Each module gets the object that holds what its rows read; read_memory takes it off again.",
        why="The attention function is called with the module, and finds its memory there.",
        upstream="Keyword arguments of the model reach the attention function of some models only.",
        until="They reach that of all.",
    ),
    EnginePatch(
        target="transformers.AttentionInterface, transformers.masking_utils.AttentionMaskInterface",
        kind="extension",
        sites=(
            "explicit.read_memory: AttentionInterface.register",
            "explicit.read_memory: AttentionMaskInterface.register",
        ),
        what="An attention function that adds memory to eager or sdpa attention is registered under a name of its "
        "own, and chosen for the model while memory is read.",
        why="One softmax over memory and context.",
        upstream="Documented extension point.",
        until="No need.",
    ),
    EnginePatch(
        target="the model: _mem_triton",
        kind="object",
        sites=("attach.attach: setattr(model, ATTRIBUTE)", "attach.remove_mem_triton: delattr(model, ATTRIBUTE)"),
        what="A model's memory is an attribute of it.",
        why="save_memory, reset_memory and the others take the model.",
        upstream="Models are plain Python objects.",
        until="No need.",
    ),
    EnginePatch(
        target="the attention modules' parameters, while an adapter is trained",
        kind="object",
        sites=("training.trainable_adapter: module.register_parameter", "training.trainable_adapter: partial(setattr)"),
        what="The adapter's tensors become parameters under their official names, and the model's own are frozen; "
        "remove_mem_triton puts both back.",
        why="Optimizers and trainers find them by model.named_parameters().",
        upstream="register_parameter is public in torch.",
        until="No need.",
    ),
)

PRIVATE: dict[str, str] = {
    "_attn_implementation": "the attention implementation in use, to add memory to it and to put it back",
}
"""Private name of transformers that is read -> what for."""
