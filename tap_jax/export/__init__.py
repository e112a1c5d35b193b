"""Client models for PyTorch, PEFT and Hugging Face; `tap_jax.export_client` chooses among them."""
