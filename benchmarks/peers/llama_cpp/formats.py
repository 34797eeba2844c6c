"""The formats of weights in which llama.cpp runs a model."""

QUANTISATIONS = ("q8_0", "q4_0")
FORMATS = ("bf16", *QUANTISATIONS)
