"""The steps of the paper: model in, record out. Stages do not import one another's decisions, only
statistics.
"""
