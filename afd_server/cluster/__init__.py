"""Starting, watching and stopping the processes of a server.

Owns the topology and its epochs. `supervisor` decides nothing about requests; launchers know
how a process is started and nothing else. Workers do not know who started them.
"""
