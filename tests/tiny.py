"""Models of random weights, two layers each."""


def save_tiny_model(family, tokenizer, folder, **more):
    """Writes a model of a family's architecture and its tokenizer; returns the folder.

    Args:
        family: as its classes begin, like `Llama`; `Gemma3` has a vision tower, too.
        tokenizer: decides the vocabulary.
        folder: where to.
        more: fields of the family's config.
    """
    import torch
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 4
    fields = {
        "vocab_size": len(tokenizer),
        **sizes,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }
    if family == "Gemma3":
        vision = {**sizes, "image_size": 28, "patch_size": 14, "vision_use_head": False}
        fields = {"text_config": fields, "vision_config": vision}
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


HEADS = {"head_dim": 16}
# a model's name begins -> its classes, trl's template for it, and more of its config
FAMILIES = {
    "qwen2.5": ("Qwen2", "qwen2_5", {}),
    "phi-3": ("Phi3", "phi3", {}),
    "llama-3.2": ("Llama", "llama3_2", {}),
    "qwen3": ("Qwen3", "qwen3", HEADS),
    "gemma-3-1b": ("Gemma3Text", "gemma3", HEADS | {"sliding_window": 32}),
    "gemma-3-4b": ("Gemma3", "gemma3", HEADS | {"sliding_window": 32}),
    # its own template is on the hub alone; this one has the same switch
    "smollm3": ("SmolLM3", "qwen3", {}),
}


def save_family(model, folder):
    """Writes a model of a hub id's architecture, with trl's template for it."""
    from transformers import AddedToken

    from benchmarks.chats import fit_tokenizer, trl_templates
    from helpers.models import load_tokenizer

    family = next(filter(model.rpartition("/")[2].lower().startswith, FAMILIES))
    kind, template, more = FAMILIES[family]
    texts = {name: t for t in trl_templates() for name in t.names}
    base = load_tokenizer("smollm2-135m-offline")
    tokenizer = fit_tokenizer(base, texts[f"trl/{template}"])
    # as Qwen3's tokenizer has them
    tags = [AddedToken(tag, special=False) for tag in ("<think>", "</think>")]
    tokenizer.add_tokens(tags)
    return save_tiny_model(kind, tokenizer, folder, **more)
