"""Measurements people can trust: what is played, the clock, the conditions, the text's verdict, and what follows.

Data flows one way: `workloads` and `plan` say what is played, `arms` play it, `clock` times it while `conditions` and
`energy` watch, `run` alternates and repeats, `verdict` judges the text, `results` keeps it all, `summary` computes
every figure, and `tables`, `plots`, `compare` and `guarantee` read those.
"""
