"""What can be seen from outside: metrics and logs. Imports the core only."""
