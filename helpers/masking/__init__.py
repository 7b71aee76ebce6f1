"""Token ids and labels of conversations: loss on the assistant's words alone."""

import lazy_loader

EXPORTS = {
    "templates": ["prepare_tokenizer", "render", "stop_token_ids"],
    "dataset": ["mask_conversation", "mask_conversations", "show"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=EXPORTS)
