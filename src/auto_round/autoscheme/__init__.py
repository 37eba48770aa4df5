"""AutoScheme: a scheme for each layer, chosen for a budget.

Candidates (`candidates`, `groups`) -> sensitivities (`scores`) -> a choice (`decision`, `choose`) -> ordinary
options with a rule for each layer (`runs`), which the pipeline carries out like any others.
"""
