"""Write a trained adapter for other tools: as a plain LoRA, a residual base with its adapter, or full weights."""
