"""Open-loop HTTP load on any OpenAI-compatible server, what it measured, and plots of it.

What is sent and how it is judged comes from `workload`; here are sockets, time and files. May
import api, telemetry, workload and core. Guarantees that requests are sent when they are due,
whatever the answers do, or says that it could not.
"""
