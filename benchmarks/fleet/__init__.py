"""Capacity on paper: many replicas, many adapters, very many compositions, simulated with the costs that were measured.

loramix bench fleet            # minutes on two cores; `--quick` is the same, much smaller, in seconds

costs.py     what things cost, from the results of the other benchmarks
start.py     what reading and checking an adapter costs, measured by this one
traffic.py   who asks for what, and when
routing.py   which replica a request is sent to
replica.py   slots, helper threads, seats; tiers.py where adapters lie
simulate.py  the clock; tally.py what it counts
study.py     which fleets are simulated
rule.py      the rule of thumb; theory.py closed forms
summary.py   what follows from all of it together; tables.py and plots.py show it
bench.py     the whole command
"""
