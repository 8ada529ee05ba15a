"""The language wing: text, tokenizers and pretrained models. It knows nothing of search (a test holds the rule)."""
