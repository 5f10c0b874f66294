"""Where models come from and what they look like: sources, the demo, the seams into Hugging Face.

Owns the way from a name to a directory of safetensors, and from there to units of weights.
Must not import offload, kv, profiling or engine, nor ray or any HTTP framework.
"""
