"""Model card templates, one per model family; see `hf_rsheat.hub.card`."""
