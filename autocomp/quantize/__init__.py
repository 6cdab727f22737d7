"""Weight quantization numerics: schemes, rounding, quantized tensors. Knows nothing of the framework."""
