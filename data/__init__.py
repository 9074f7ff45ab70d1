"""Sources, tokenizer, token shards, packing loader and synthetic long-context tasks. Knows no model."""
