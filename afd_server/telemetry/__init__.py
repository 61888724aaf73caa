"""What can be seen from outside: metrics, the timeline and logs. Imports the core only."""
