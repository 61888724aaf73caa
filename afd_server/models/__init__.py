"""One file per architecture, named as its model_type, with both halves in it.

Owns the mathematics of a layer and which tensors each half needs. Imports core and kernels.
Knows nothing of requests, lanes, sockets or files: weights come from a `TensorReader`, and at
every A→F boundary `forward` simply yields.
"""
