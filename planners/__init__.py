"""Planners turn a data set and its fingerprint into a plan: rules.py holds the pure rules, the other files the planners."""

if __name__ == "planners":
    raise ImportError("this folder is the package autoseg.planners; import it by that name")
