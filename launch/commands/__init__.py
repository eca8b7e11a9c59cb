"""The sub-commands of `longring` that show, plan, measure or submit, one file each."""
