"""Weight quantization numerics: schemes, rounding, quantized tensors. Knows nothing of the framework.

``scheme`` is free of torch and may be imported anywhere; import the numerics from their modules
(``rounding.quantize``, ``tensor.QuantizedTensor``).
"""
