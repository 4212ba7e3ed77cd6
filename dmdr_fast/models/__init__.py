"""One file per network family, the LoRA adapters that several roles share, and the latent decoders."""
