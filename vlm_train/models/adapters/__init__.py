"""Changes to a built model: LoRA and quantized layers."""
