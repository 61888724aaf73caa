"""The programs of the two pools, and the loop they share.

Owns one process, one device and one half of the model each. An attention worker holds all
that belongs to a request, an FFN worker weights and nothing else; the placement says which weights
are where. They meet only over the wire. Workers do not know who started them.
"""
