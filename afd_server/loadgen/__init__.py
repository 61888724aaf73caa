"""Open-loop HTTP load on any OpenAI-compatible server, what it measured, and plots of it.

What is sent and how it is judged comes from `workload`; here are sockets, time and files. Imports
that and the core, and knows nothing of our own server but two of its paths. Guarantees that
requests are sent when they are due, whatever the answers do, or says that they were not.
"""
