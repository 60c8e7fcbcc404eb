"""What is right for each folder of tests/cases/, by area: `CHECKS` of each module maps a folder's name to a function.

A check takes the case's folder (a copy of its own, which it may write to) and fails when rlpost does not behave as the
folder's README says.
"""
