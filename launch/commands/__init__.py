"""The sub-commands of `longring`, one file each; launch/cli.py parses their arguments."""
